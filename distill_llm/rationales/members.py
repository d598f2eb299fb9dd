"""Several teachers side by side: how right each of them is, what its votes weigh, what became of its completions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from distill_llm.rationales.vote import vote

if TYPE_CHECKING:
    from distill_llm.core.example import Example
    from distill_llm.rationales.dataset import Judged, RationaleRow
    from distill_llm.rationales.voices import Voice
    from distill_llm.tasks.base import Task


@dataclass(slots=True)
class Score:
    """Completions of examples with a gold label, and how many of them reach it. ``choices``: the most of an example."""

    known: int = 0
    right: int = 0
    choices: int = 2

    def count(self, label: str | None, example: Example, task: Task) -> None:
        if example.label is None:
            return
        self.known += 1
        self.right += label is not None and task.same(label, example.label)
        self.choices = max(self.choices, len(example.choices))

    @property
    def log_odds(self) -> float:
        """log(p (C - 1) / (1 - p)) of C choices, 0 where it is no better than chance.

        The best weights of independent voters: Nitzan & Paroush 1982 (International Economic Review 23, 289) for two
        choices. p is (right + 1) / (known + 2), so that few examples make nobody infallible.
        """
        p = (self.right + 1) / (self.known + 2)
        return max(0.0, math.log(p * (self.choices - 1) / (1 - p)))


def say_of_each(voices: Sequence[Voice], scores: Mapping[str, Score] | None) -> dict[str, float]:
    """What each teacher has to say in a vote; ``scores``: of each, where they decide. All alike if nobody is better
    than chance."""
    voting = [voice for voice in voices if voice.votes] or list(voices)
    fixed = {voice.name: voice.weight if voice in voting else 0.0 for voice in voices}
    if scores is None:
        return fixed
    measured = {name: weight * scores[name].log_odds for name, weight in fixed.items()}
    return measured if any(measured.values()) else fixed


def weights_of(plain: Sequence[Judged], say: Mapping[str, float]) -> list[Fraction]:
    """What the vote of each completion weighs: a teacher's say is shared out among its completions of the example."""
    names = [judged.request.teacher for judged in plain]
    return [Fraction(say[name]) / names.count(name) for name in names]


@dataclass(slots=True)
class Share:
    """One teacher's part of a split, counted in completions as the funnel counts them."""

    asked: int = 0
    completed: int = 0
    parsed: int = 0
    kept: int = 0
    cut: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    known: int = 0
    right: int = 0
    say: float = 1.0
    dropped: str = ""

    def count(self, rows: Iterable[RationaleRow], task: Task) -> None:
        """``right`` and ``known`` are of plain completions of examples with a gold label."""
        for row in rows:
            self.asked += 1
            self.completed += row.outcome != "not completed"
            self.parsed += row.completion_label is not None
            self.kept += row.outcome == "kept"
            self.cut += row.cut
            self.tokens_in += row.tokens_in
            self.tokens_out += row.tokens_out
            if row.gold_label is not None and not row.hinted and row.outcome != "not completed":
                self.known += 1
                self.right += row.completion_label is not None and task.same(row.completion_label, row.gold_label)

    def report(self) -> dict[str, Any]:
        return asdict(self) | {"accuracy": self.right / self.known if self.known else None}


@dataclass(frozen=True, slots=True)
class _Stated:
    label: str | None


def own_votes(rows: Iterable[RationaleRow], teacher: str, task: Task) -> dict[str, str | None]:
    """By example, the label that most of one teacher's completions reach."""
    stated: dict[str, list[_Stated]] = {}
    for row in rows:
        if row.teacher == teacher and not row.hinted:
            stated.setdefault(row.example_id, []).append(_Stated(row.completion_label))
    return {example: vote(labels, task.same)[0] for example, labels in stated.items()}


def describe_dropped(shares: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """A sentence for each teacher that was dropped; ``shares``: of a funnel's splits, by split and teacher."""
    seen: dict[str, str] = {}
    done: dict[str, int] = {}
    for split in shares.values():
        for name, share in split.items():
            done[name] = done.get(name, 0) + share["completed"]
            if share["dropped"]:
                seen[name] = share["dropped"]
    for name, reason in seen.items():
        what = f"its {done[name]:,} completions before that count" if done[name] else "nothing of it counts"
        yield f"The teacher '{name}' was dropped ({what}): {reason}"
