"""What a student is trained on, of what there is."""

from __future__ import annotations

from pydantic import Field, model_validator

from distill_llm.core.component import Component


class TransferSpec(Component):
    """A transfer set without some classes: the student never sees their examples (Hinton et al. 2015,
    arXiv:1503.02531, sec. 3), and learns of them by soft labels alone."""

    without: tuple[str, ...] = Field(default=(), description="labels whose examples are left out")
    only: tuple[str, ...] = Field(default=(), description="labels whose examples alone are taken; empty: all")

    @model_validator(mode="after")
    def _one_of_them(self) -> TransferSpec:
        if bool(self.without) == bool(self.only):
            came = "both came" if self.only else "neither came"
            raise ValueError(
                f"give the labels that are left out as `without`, or those that are left as `only`; {came}"
            )
        return self

    @property
    def named(self) -> tuple[str, ...]:
        return self.without or self.only
