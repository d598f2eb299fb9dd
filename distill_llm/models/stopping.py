"""Texts at which a completion ends, for any tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

_SPARE_TOKENS = 4  # a tail that begins inside a character, or loses its first space, is still long enough


class StopTexts:
    """A stopping criterion for ``generate``: a row is done where the text that it wrote holds one of ``stop``.

    Each step reads the tail of a row only. transformers' own `stop_strings` reads the vocabulary instead, and knows no
    tokenizer of whole words.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], *, start: int, rows: int):
        self._tokenizer, self._stop, self._start = tokenizer, tuple(stop), start
        self._tail = max(len(text.encode()) for text in stop) + _SPARE_TOKENS
        self.done = [False] * rows

    def __call__(self, ids: Int[Tensor, "B T"], scores: Any, **options: Any) -> Bool[Tensor, " B"]:
        """Which rows are done."""
        import torch

        waiting = [row for row, done in enumerate(self.done) if not done]
        tails = ids[waiting, max(self._start, ids.size(1) - self._tail) :].tolist()
        for row, tail in zip(waiting, tails, strict=True):
            if self._holds(tail):
                # A tail may read otherwise than the same tokens in their place: the whole text decides.
                self.done[row] = self._holds(ids[row, self._start :].tolist())
        return torch.tensor(self.done, device=ids.device)

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows only."""
        self.done = [self.done[row] for row in rows]

    def _holds(self, tokens: list[int]) -> bool:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return any(stop in text for stop in self._stop)


def first_stop(text: str, stop: Sequence[str]) -> int:
    """Where the earliest stop text begins; -1 where there is none."""
    return min((place for place in map(text.find, stop) if place >= 0), default=-1)


def tokens_of(length: int, ids: Sequence[int], tokenizer: Any) -> int:
    """The fewest of ``ids`` whose text has the first ``length`` characters of the text of them all."""
    count = len(ids)
    while count and len(tokenizer.decode(ids[: count - 1], skip_special_tokens=True)) >= length:
        count -= 1
    return count if length else 0
