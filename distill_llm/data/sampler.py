"""Which rows an optimiser step sees. The same rows, however they are split over micro-batches and ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill_llm.data.rows import Row


class StepSampler:
    """Yields micro-batches of row indices, ``rows_per_step / rows_per_batch`` of them for each step.

    Examples are shuffled anew each epoch, and the rows of one example stay together: each step has its fair share of
    every target. Epochs follow each other without a gap. Within a step, rows are sorted by target and length before
    they are cut into micro-batches, so that little padding is bought; the step's update does not depend on the cut,
    because each term is divided by its tokens over the whole step. Consecutive micro-batches go to different ranks:
    they are dealt from the same rows, so that no rank gets all the long ones.
    """

    def __init__(
        self, rows: Sequence[Row], *, rows_per_step: int, rows_per_batch: int, max_steps: int, seed: int, ranks: int = 1
    ):
        assert rows_per_step % (rows_per_batch * ranks) == 0
        self._rows = rows
        self._rows_per_step, self._rows_per_batch = rows_per_step, rows_per_batch
        self._max_steps, self._seed, self._ranks = max_steps, seed, ranks

    def __len__(self) -> int:
        return self._max_steps * (self._rows_per_step // self._rows_per_batch)

    def __iter__(self) -> Iterator[list[int]]:
        stream = self._stream()
        for _ in range(self._max_steps):
            step = [next(stream) for _ in range(self._rows_per_step)]
            step.sort(key=self._size)
            together = self._rows_per_batch * self._ranks
            for start in range(0, self._rows_per_step, together):
                for rank in range(self._ranks):
                    yield step[start + rank : start + together : self._ranks]

    def tokens_until(self, step: int) -> int:
        """Tokens, of inputs and targets, of the rows that the first steps see."""
        batches = islice(iter(self), step * (self._rows_per_step // self._rows_per_batch))
        return sum(self._rows[index].num_tokens for batch in batches for index in batch)

    def _stream(self) -> Iterator[int]:
        by_example: dict[int, list[int]] = {}
        for index, row in enumerate(self._rows):
            by_example.setdefault(row.example, []).append(index)
        examples, epoch = list(by_example), 0
        while True:
            random.Random(f"{self._seed} epoch {epoch}").shuffle(examples)
            for example in examples:
                yield from by_example[example]
            examples.sort()
            epoch += 1

    def _size(self, index: int) -> tuple[str, int, int]:
        row = self._rows[index]
        return row.target, len(row.label_ids), len(row.input_ids)
