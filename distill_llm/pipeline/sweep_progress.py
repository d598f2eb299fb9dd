"""What a sweep shows while it trains: one bar for all of its runs, and a line for each that is finished."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from distill_llm.core.errors import DistillError
from distill_llm.core.progress import Progress


class AllRuns:
    """The Progress of the runs together. A run advances under its label, and is finished when it is at its total."""

    def __init__(self, progress: Progress, total: int, there: int):
        self._progress, self._total, self._there = progress, total, there
        self._shares: dict[str, float] = {}
        if there:
            progress.say(f"sweep: {there} of {total} runs are there already")

    def advance(self, name: str, done: float, total: float, note: str = "") -> None:
        self._shares[name] = done / total
        finished = self._there + math.floor(sum(self._shares.values()) + 1e-9)
        if done >= total:
            self._progress.say(f"[{finished}/{self._total}] {name}: {note}")
            note = ""
        self._progress.advance("sweep", finished, self._total, f"{name}: {note}" if note else "")

    def say(self, message: str) -> None:
        pass


class OneRun:
    """The Progress of one run: whatever it does is shown in a note, and it is not finished before its result is there.

    What it says, such as its rows, is left out: the chosen run says it again when it is scored.
    """

    def __init__(self, label: str, progress: Progress):
        self._label, self._progress = label, progress

    def advance(self, name: str, done: float, total: float, note: str = "") -> None:
        told = f"{name} {done:,.0f}/{total:,.0f}{f', {note}' if note else ''}"
        self._progress.advance(self._label, 0.0, 1.0, told)

    def say(self, message: str) -> None:
        pass


class Prefixed:
    """A Progress whose bars and lines begin with the same words."""

    def __init__(self, prefix: str, progress: Progress):
        self._prefix, self._progress = prefix, progress

    def advance(self, name: str, done: float, total: float, note: str = "") -> None:
        self._progress.advance(f"{self._prefix}{name}", done, total, note)

    def say(self, message: str) -> None:
        self._progress.say(f"{self._prefix}{message}")


@contextmanager
def naming(label: str) -> Iterator[None]:
    """An error of one run says which run it is of."""
    try:
        yield
    except DistillError as error:
        raise type(error)(f"{label}: {error}") from error
