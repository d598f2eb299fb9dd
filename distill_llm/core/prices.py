"""What a hosted teacher costs."""

from __future__ import annotations

from pydantic import Field

from distill_llm.core.component import Component


class Prices(Component):
    """What a hosted teacher costs, in one currency, for a million tokens."""

    input_per_million: float = Field(default=0.0, ge=0)
    output_per_million: float = Field(default=0.0, ge=0)
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")

    @property
    def known(self) -> bool:
        return self.input_per_million > 0 or self.output_per_million > 0

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.input_per_million + tokens_out * self.output_per_million) / 1e6
