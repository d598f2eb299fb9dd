"""Which rows an optimiser step sees. The same rows, however they are split over micro-batches and ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import TYPE_CHECKING

from distill_llm.data.cuts import Run, TokenCuts

if TYPE_CHECKING:
    from distill_llm.data.rows import Row


class StepSampler:
    """Yields micro-batches of row indices, ``micro_batches`` for each step and rank.

    Examples are shuffled anew each epoch, and the rows of one example stay together: each step has its fair share of
    every target. Epochs follow each other without a gap. Within a step, rows are sorted by target and length before
    they are cut into micro-batches, so that little padding is bought; the step's update does not depend on the cut,
    because each term is divided by its tokens over the whole step. Consecutive micro-batches go to different ranks:
    they are dealt from the same rows, so that no rank gets all the long ones. With ``share_inputs`` rows of one example
    and one input are a run, which is sorted by its longest target and stays whole, but for the edges: an encoder reads
    the input once for all of them.

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
        share_inputs: bool = False,
    ):
        assert rows_per_step % (ranks if tokens_per_batch else rows_per_batch * ranks) == 0
        self._rows = rows
        self._rows_per_step, self._rows_per_batch = rows_per_step, rows_per_batch
        self._max_steps, self._seed, self._ranks = max_steps, seed, ranks
        self._inputs: dict[int, object] = {}
        if share_inputs:
            self._inputs = {index: (row.example, tuple(row.input_ids)) for index, row in enumerate(rows)}
        self._cuts: TokenCuts | None = None
        if tokens_per_batch:
            steps = map(self._runs, self._steps())
            self._cuts = TokenCuts(rows, limit=tokens_per_batch, ranks=ranks, shared=share_inputs, steps=steps)
        self.micro_batches = self._cuts.count if self._cuts else rows_per_step // (rows_per_batch * ranks)

    def __len__(self) -> int:
        return self._max_steps * self.micro_batches * self._ranks

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps():
            runs = self._runs(step)
            yield from self._by_rows(runs) if self._cuts is None else self._cuts.of(runs)

    def tokens_until(self, step: int) -> int:
        """Tokens, of inputs and targets, of the rows that the first steps see."""
        return sum(self._rows[index].num_tokens for indices in islice(self._steps(), step) for index in indices)

    def _steps(self) -> Iterator[list[int]]:
        stream = self._stream()
        for _ in range(self._max_steps):
            yield list(islice(stream, self._rows_per_step))

    def _runs(self, step: Sequence[int]) -> list[Run]:
        """The rows of a step, sorted; each is a run of its own where no input is shared."""
        found: dict[object, list[int]] = {}
        for place, index in enumerate(step):
            found.setdefault(self._inputs.get(index, place), []).append(index)
        return sorted((tuple(run) for run in found.values()), key=lambda run: max(map(self._size, run)))

    def _by_rows(self, runs: Sequence[Run]) -> Iterator[list[int]]:
        together = self._rows_per_batch * self._ranks
        step = [(index, number) for number, run in enumerate(runs) for index in run]
        for start in range(0, len(step), together):
            yield from self._dealt(step[start : start + together])

    def _dealt(self, window: Sequence[tuple[int, int]]) -> list[list[int]]:
        """As many rows to each rank; ``window`` has rows with the number of their run."""
        shares: list[list[int]] = [[] for _ in range(self._ranks)]
        for _, group in groupby(window, key=itemgetter(1)):
            run = [index for index, _ in group]
            while run:
                share = min(shares, key=len)
                room = self._rows_per_batch - len(share)
                share += run[:room]
                run = run[room:]
        return shares

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
        return row.target, row.num_target_tokens, row.num_input_tokens
