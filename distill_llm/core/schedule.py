"""Numbers of a recipe that change while a student is trained."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from distill_llm.core.component import Component


class Schedule(Component):
    """A number that moves from ``start`` to ``end`` over the first ``over`` of a training, and stays there."""

    start: float = Field(ge=0, allow_inf_nan=False)
    end: float = Field(ge=0, allow_inf_nan=False)
    over: float = Field(default=1.0, gt=0, le=1, description="share of the training's steps")
    shape: Literal["linear", "cosine"] = "linear"

    def value(self, progress: float) -> float:
        """Its value when a share ``progress`` (0..1) of the training is done."""
        share = min(1.0, progress / self.over)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share


def number_at(number: float | Schedule, progress: float) -> float:
    """A constant as it is, a schedule's value at ``progress``."""
    return number.value(progress) if isinstance(number, Schedule) else number
