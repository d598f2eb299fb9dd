"""Which rows an optimiser step sees. The same rows, however they are split over micro-batches and ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from distill_llm.core.errors import ConfigError

if TYPE_CHECKING:
    from distill_llm.data.rows import Row


class StepSampler:
    """Yields micro-batches of row indices, ``micro_batches`` for each step and rank.

    Examples are shuffled anew each epoch, and the rows of one example stay together: each step has its fair share of
    every target. Epochs follow each other without a gap. Within a step, rows are sorted by target and length before
    they are cut into micro-batches, so that little padding is bought; the step's update does not depend on the cut,
    because each term is divided by its tokens over the whole step. Consecutive micro-batches go to different ranks:
    they are dealt from the same rows, so that no rank gets all the long ones.

    Micro-batches have ``rows_per_batch`` rows each; or, with ``tokens_per_batch``, up to so many tokens, padding
    included, and ``rows_per_batch`` is not looked at. Then ``micro_batches`` is what the step with the most tokens
    needs, because Trainer takes the same number in all of them: the largest ones of other steps are halved until there
    are as many. Raises ConfigError where a row alone has more tokens.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        rows_per_step: int,
        rows_per_batch: int,
        max_steps: int,
        seed: int,
        ranks: int = 1,
        tokens_per_batch: int = 0,
    ):
        assert rows_per_step % (ranks if tokens_per_batch else rows_per_batch * ranks) == 0
        self._rows = rows
        self._rows_per_step, self._rows_per_batch = rows_per_step, rows_per_batch
        self._max_steps, self._seed, self._ranks = max_steps, seed, ranks
        self._tokens_per_batch = tokens_per_batch
        self.micro_batches = self._most_cuts() if tokens_per_batch else rows_per_step // (rows_per_batch * ranks)

    def __len__(self) -> int:
        return self._max_steps * self.micro_batches * self._ranks

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps():
            for start, stop in self._evenly(step) if self._tokens_per_batch else self._by_rows():
                for rank in range(self._ranks):
                    yield step[start + rank : stop : self._ranks]

    def tokens_until(self, step: int) -> int:
        """Tokens, of inputs and targets, of the rows that the first steps see."""
        return sum(self._rows[index].num_tokens for indices in islice(self._steps(), step) for index in indices)

    def _steps(self) -> Iterator[list[int]]:
        stream = self._stream()
        for _ in range(self._max_steps):
            yield sorted(islice(stream, self._rows_per_step), key=self._size)

    def _by_rows(self) -> list[tuple[int, int]]:
        together = self._rows_per_batch * self._ranks
        return [(start, start + together) for start in range(0, self._rows_per_step, together)]

    def _most_cuts(self) -> int:
        longest = max((row.num_tokens for row in self._rows), default=0)
        if longest > self._tokens_per_batch:
            raise ConfigError(
                f"train.tokens_per_batch: a row has {longest:,} tokens, which is more than {self._tokens_per_batch:,}. "
                f"Choose at least {longest:,}, or cut rows with `train.max_input_tokens` and `train.max_target_tokens`."
            )
        return max(len(self._by_tokens(step)) for step in self._steps())

    def _by_tokens(self, step: Sequence[int]) -> list[tuple[int, int]]:
        """The fewest cuts (first row, last row + 1) that keep to the limit; each rank gets a row of each."""
        cuts, start = [], 0
        inputs = labels = 0
        for stop in range(self._ranks, len(step) + 1, self._ranks):
            new = [self._rows[index] for index in step[stop - self._ranks : stop]]
            wide, long = max(len(row.input_ids) for row in new), max(len(row.label_ids) for row in new)
            inputs, labels = max(inputs, wide), max(labels, long)
            last = stop - self._ranks
            if last > start and (stop - start) // self._ranks * (inputs + labels) > self._tokens_per_batch:
                cuts.append((start, last))
                start, inputs, labels = last, wide, long
        return [*cuts, (start, len(step))]

    def _evenly(self, step: Sequence[int]) -> list[tuple[int, int]]:
        """As many cuts as the other steps have."""
        cuts = self._by_tokens(step)
        while len(cuts) < self.micro_batches:
            start, stop = max(cuts, key=lambda cut: (cut[1] - cut[0] > self._ranks, self._padded(step, *cut)))
            middle = start + (stop - start) // self._ranks // 2 * self._ranks
            at = cuts.index((start, stop))
            cuts[at : at + 1] = [(start, middle), (middle, stop)]
        return cuts

    def _padded(self, step: Sequence[int], start: int, stop: int) -> int:
        rows = [self._rows[index] for index in step[start:stop]]
        return len(rows) * (max(len(row.input_ids) for row in rows) + max(len(row.label_ids) for row in rows))

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
