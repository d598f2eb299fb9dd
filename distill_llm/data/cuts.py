"""Where a step is cut into micro-batches that keep to a limit of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distill_llm.core.errors import ConfigError

if TYPE_CHECKING:
    from distill_llm.data.rows import Row

Run = tuple[int, ...]
"""Indices of rows that stay in one micro-batch where they can."""
_Cut = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Load:
    """What one rank's part of some runs comes to, at most. ``targets``: how many rows of each, and the longest;
    ``views``: the same of the rows as a teacher with a view of its own reads them."""

    runs: int = 0
    longest_input: int = 0
    targets: dict[str, tuple[int, int]] = field(default_factory=dict)
    views: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of the largest pass: the student's, or a teacher's; they come one after the other."""
        own = self.runs * self.longest_input + sum(count * longest for count, longest in self.targets.values())
        return max(own, *(count * longest for count, longest in self.views.values()), 0)


class TokenCuts:
    """Micro-batches of up to ``limit`` tokens in the pass of any model, padding included.

    ``shared``: the rows of a run have one input, which counts once, and each target's rows are padded by themselves.
    Raises ConfigError where a row alone has more tokens.
    """

    def __init__(self, rows: Sequence[Row], *, limit: int, ranks: int, shared: bool, steps: Iterable[Sequence[Run]]):
        _refuse_long_rows(rows, limit)
        self._rows, self._limit, self._ranks, self._shared = rows, limit, ranks, shared
        self.count = 0
        self.count = max(len(self._fewest(self._dealable(step))) for step in steps)

    def of(self, step: Sequence[Run]) -> Iterator[list[int]]:
        """``count`` micro-batches for each rank, those of a cut one behind the other."""
        runs = self._dealable(step)
        for start, stop in self._evenly(runs):
            for rank in range(self._ranks):
                yield [index for run in runs[start + rank : stop : self._ranks] for index in run]

    def _dealable(self, step: Sequence[Run]) -> list[Run]:
        """Runs of which each rank has as many in each cut. Some are split for it, and those that are too large."""
        runs: list[Run] = []
        for run in step:
            fits = len(run) == 1 or self._plus(_Load(), [run]).tokens <= self._limit
            runs += [run] if fits else [(index,) for index in run]
        while len(runs) % self._ranks or len(runs) < self.count * self._ranks:
            place = next(place for place, run in enumerate(runs) if len(run) > 1)
            runs[place : place + 1] = [runs[place][:1], runs[place][1:]]
        return runs

    def _fewest(self, runs: Sequence[Run]) -> list[_Cut]:
        """The fewest cuts (first run, last run + 1) that keep to the limit; each rank gets a run of each."""
        cuts, start, load = [], 0, _Load()
        for last in range(0, len(runs), self._ranks):
            new = runs[last : last + self._ranks]
            more = self._plus(load, new)
            if last > start and more.tokens > self._limit:
                cuts.append((start, last))
                start, more = last, self._plus(_Load(), new)
            load = more
        return [*cuts, (start, len(runs))]

    def _evenly(self, runs: Sequence[Run]) -> list[_Cut]:
        """As many cuts as the other steps have: the largest are halved."""
        cuts = self._fewest(runs)
        while len(cuts) < self.count:
            start, stop = max(cuts, key=lambda cut: (cut[1] - cut[0] > self._ranks, self._tokens(runs, *cut)))
            middle = start + (stop - start) // self._ranks // 2 * self._ranks
            at = cuts.index((start, stop))
            cuts[at : at + 1] = [(start, middle), (middle, stop)]
        return cuts

    def _tokens(self, runs: Sequence[Run], start: int, stop: int) -> int:
        load = _Load()
        for first in range(start, stop, self._ranks):
            load = self._plus(load, runs[first : first + self._ranks])
        return load.tokens

    def _plus(self, load: _Load, runs: Sequence[Run]) -> _Load:
        """With one more run for each rank."""
        rows = [[self._rows[index] for index in run] for run in runs]
        targets = [[(row.target if self._shared else "", row.num_target_tokens) for row in run] for run in rows]
        views = [[(name, view.num_tokens) for row in run for name, view in row.views.items()] for run in rows]
        longest = max(load.longest_input, *(run[0].num_input_tokens for run in rows))
        return _Load(load.runs + 1, longest, _with(load.targets, targets), _with(load.views, views))


def _with(there: dict[str, tuple[int, int]], runs: Sequence[Sequence[tuple[str, int]]]) -> dict[str, tuple[int, int]]:
    """Counts and lengths by name after one more run for each rank: the longest of all, the count of the largest."""
    found, more = dict(there), dict[str, int]()
    for run in runs:
        own: dict[str, int] = {}
        for name, length in run:
            own[name] = own.get(name, 0) + 1
            count, longest = found.get(name, (0, 0))
            found[name] = count, max(longest, length)
        more |= {name: max(count, more.get(name, 0)) for name, count in own.items()}
    for name, count in more.items():
        found[name] = found[name][0] + count, found[name][1]
    return found


def _refuse_long_rows(rows: Sequence[Row], limit: int) -> None:
    longest = max((row.num_tokens for row in rows), default=0)
    if longest > limit:
        raise ConfigError(
            f"train.tokens_per_batch: a row has {longest:,} tokens, which is more than {limit:,}. Choose at least "
            f"{longest:,}, or cut rows with `train.max_input_tokens` and `train.max_target_tokens`."
        )
    for name in sorted({name for row in rows for name in row.views}):
        longest = max(row.tokens_for(name) for row in rows if name in row.views)
        if longest > limit:
            raise ConfigError(
                f"train.tokens_per_batch: a row has {longest:,} tokens as teachers.{name} reads it (`view`, "
                f"`own_tokenizer`), which is more than {limit:,}. Choose at least {longest:,}, or shorten the view."
            )
