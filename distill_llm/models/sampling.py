"""Which token comes next: greedy or drawn, with random numbers that belong to the row and not to its batch.

B rows, V vocabulary, K likeliest tokens, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill_llm.core.files import fingerprint

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepScores:
    """Log-probabilities (nats, at temperature 1) of one row's tokens and of the K likeliest ones at each step."""

    logprobs: list[float]
    top_tokens: list[tuple[int, ...]]
    top_logprobs: list[tuple[float, ...]]

    def __add__(self, later: StepScores) -> StepScores:
        return StepScores(
            self.logprobs + later.logprobs, self.top_tokens + later.top_tokens, self.top_logprobs + later.top_logprobs
        )

    def first(self, count: int) -> StepScores:
        """Those of the first ``count`` steps."""
        return StepScores(self.logprobs[:count], self.top_tokens[:count], self.top_logprobs[:count])


def uniforms(key: str, count: int) -> np.ndarray:
    """``count`` numbers in [0, 1) that depend on ``key`` alone; a larger ``count`` begins with the same ones."""
    import numpy as np

    return np.random.Generator(np.random.Philox(key=int(fingerprint(key), 16))).random(count)


def draw(scores: Float[Tensor, "B V"], numbers: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token of each row at which its cumulative probability passes its number in [0, 1).

    In float64: in float32 the sum over a large vocabulary would never reach the numbers next to 1.
    """
    if scores.device.type == "mps":  # which has no float64
        return draw(scores.cpu(), numbers.cpu()).to(scores.device)
    cumulative = scores.double().softmax(-1).cumsum(-1)
    thresholds = numbers.double()[:, None] * cumulative[:, -1:]
    # The product of a number below 1 can round up to the sum: argmax then is the last token that can be drawn.
    last = cumulative.argmax(-1, keepdim=True)
    return (cumulative <= thresholds).sum(-1, keepdim=True).minimum(last).squeeze(-1)


class TokenChooser:
    """A logits processor for ``generate`` that leaves one token a row: the likeliest, or one drawn by the row's key.

    It is the last of the chain, so that greedy decoding takes what it chose. ``draws`` (a key a row) is read at a
    temperature above 0 only. With ``top_logprobs`` it notes them at each step.
    """

    def __init__(self, draws: Sequence[str], *, temperature: float, top_p: float, steps: int, top_logprobs: int):
        import numpy as np
        import torch

        self._warpers = _warpers(temperature, top_p)
        self._top, self._steps = top_logprobs, 0
        self._numbers: Tensor | None = None
        if temperature > 0:
            self._numbers = torch.from_numpy(np.stack([uniforms(key, steps) for key in draws]))
        self._noted: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """Scores of which only the chosen token's is not minus infinity."""
        import torch

        warped = scores
        for warper in self._warpers:
            warped = warper(ids, warped)
        chosen = warped.argmax(-1)
        if self._numbers is not None:
            chosen = draw(warped, self._numbers[:, self._steps].to(scores.device))
        self._steps += 1
        if self._top:
            logprobs = scores.float().log_softmax(-1)
            top = logprobs.topk(min(self._top, scores.size(-1)), dim=-1)
            self._noted.append((logprobs.gather(-1, chosen[:, None]).squeeze(-1), top.indices, top.values))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows only."""
        if self._numbers is not None:
            self._numbers = self._numbers[list(rows)]

    def take(self) -> list[StepScores]:
        """What was noted since the last call, a row each; empty where nothing is."""
        if not self._noted:
            return []
        import torch

        chosen, tokens, values = (torch.stack(part, dim=1).tolist() for part in zip(*self._noted, strict=True))
        self._noted.clear()
        return [
            StepScores(row, [tuple(step) for step in top], [tuple(step) for step in numbers])
            for row, top, numbers in zip(chosen, tokens, values, strict=True)
        ]


def _warpers(temperature: float, top_p: float) -> list[Any]:
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = []
    if temperature > 0 and temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if temperature > 0 and top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers
