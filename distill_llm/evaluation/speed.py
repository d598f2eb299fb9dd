"""How long a model takes for one example, and for many."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

_WARM_UP = 2


class Speed(BaseModel):
    """Milliseconds of single examples, half of which take at most the median, and examples a second in batches."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    median_ms: float = Field(ge=0)
    p95_ms: float = Field(ge=0, description="95 of 100 examples take at most this long")
    timed_examples: int = Field(ge=1, description="of which the two are")
    examples_per_second: float = Field(ge=0)


def time_singly(ask: Callable[[Sequence[Any]], object], asked: Sequence[Any]) -> list[float]:
    """Seconds for each of ``asked``, alone; the first few are asked once before the clock runs."""
    for one in asked[:_WARM_UP]:
        ask([one])
    taken = []
    for one in asked:
        began = time.perf_counter()
        ask([one])
        taken.append(time.perf_counter() - began)
    return taken


def speed_of(singly: Sequence[float], *, examples: int, seconds: float) -> Speed:
    """``singly``: seconds of single examples; ``seconds``: of all ``examples`` in batches."""
    median, p95 = np.quantile(singly, [0.5, 0.95])
    return Speed(
        median_ms=float(1000 * median),
        p95_ms=float(1000 * p95),
        timed_examples=len(singly),
        examples_per_second=examples / seconds if seconds > 0 else 0.0,
    )
