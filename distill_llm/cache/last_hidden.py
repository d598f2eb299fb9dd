"""What goes into a teacher's head, from which all its words can be had back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from distill_llm.cache.payload import Payload, Said, must_be_numbers

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from distill_llm.cache.shards import Columns


class LastHidden(Payload):
    """The last hidden state of each token; the teacher's head, kept beside it, makes its logits while training.

    Exact for any loss at any temperature, but for the rounding of ``dtype``.
    """

    kind: Literal["last_hidden"] = "last_hidden"
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="float32: twice the size")
    gives_logits: ClassVar[bool] = True

    @property
    def bfloat16(self) -> tuple[str, ...]:
        return ("hidden",) if self.dtype == "bfloat16" else ()

    def encode(self, said: Said) -> Columns:
        import torch

        must_be_numbers(said.hidden)
        if self.dtype == "float32":
            return {"hidden": said.hidden.float().cpu().numpy()}
        return {"hidden": said.hidden.to("cpu", torch.bfloat16).view(torch.uint16).numpy()}

    def hidden_of(self, columns: Mapping[str, Any]) -> Float[Tensor, "N D"]:
        """The hidden states of N tokens, on the CPU."""
        import torch

        stored = torch.from_numpy(columns["hidden"])
        return stored if self.dtype == "float32" else stored.view(torch.bfloat16)
