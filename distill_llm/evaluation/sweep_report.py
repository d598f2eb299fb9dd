"""What a sweep came to: validation accuracy of each setting, the one to take, and what that one scores on test.

Pure functions over accuracies that are already there. Differences are fractions in the data classes and percentage
points in text; a deviation is that of a sample (n - 1), over seeds.
"""

from __future__ import annotations

import datetime
from statistics import mean, stdev
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from distill_llm.core.files import write_json, write_text
from distill_llm.evaluation.scorecard import Role
from distill_llm.evaluation.text_tables import (
    markdown_table,
    percent_spread,
    points_spread,
    short_count,
    short_number,
    terminal_table,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.table import Table

    from distill_llm.evaluation.scorecard import Scorecard

BEST = "best"
CHOICE_NOTE = (
    "Validation chose, so that its accuracy of the chosen setting is rather too high. Test was not looked at before "
    "the choice, and for no other setting."
)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AxisRecord(_Record):
    """``values`` are as typed, ``shown`` the same, short; ``keys`` were given the same value."""

    keys: tuple[str, ...]
    name: str
    values: tuple[JsonValue, ...]
    shown: tuple[str, ...]


class Tried(_Record):
    """One setting: the place of its value on each axis, and what its students came to, seed by seed."""

    places: tuple[int, ...]
    overrides: tuple[str, ...]
    validation: tuple[float, ...] = Field(min_length=1)
    mean: float
    deviation: float | None
    parameters: int | None
    train_seconds: float = Field(description="of one run, the mean over seeds")
    folders: tuple[str, ...]


class Scored(_Record):
    """A model on test, seed by seed; differences are the chosen student's accuracy minus its own."""

    name: str
    role: Role
    accuracies: tuple[float, ...]
    mean: float
    deviation: float | None
    difference: float | None
    difference_deviation: float | None
    ahead: int | None = Field(description="seeds on which the student is ahead of it")


class SweepReport(_Record):
    """``chosen`` is a place in ``tried``; ``test`` is of the chosen setting alone."""

    recipe: str
    metric: str
    axes: tuple[AxisRecord, ...]
    seeds: tuple[int, ...]
    grid_size: int
    validation_examples: int
    test_examples: int
    tried: tuple[Tried, ...] = Field(min_length=1)
    chosen: int
    advice: str
    test: tuple[Scored, ...]
    scorecards: tuple[str, ...]
    verdicts: tuple[str, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    hardware: str
    created: datetime.date

    @property
    def best(self) -> Tried:
        return self.tried[self.chosen]

    def shown(self, tried: Tried) -> list[str]:
        return [axis.shown[place] for axis, place in zip(self.axes, tried.places, strict=True)]


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; None where there is but one value."""
    return mean(values), stdev(values) if len(values) > 1 else None


def choose(validation: Sequence[Sequence[float]]) -> int:
    """The setting with the best mean validation accuracy; of equals the first."""
    means = [mean(accuracies) for accuracies in validation]
    return means.index(max(means))


def advise(axes: Sequence[AxisRecord], tried: Sequence[Tried], chosen: int) -> str:
    """One line: what to take, how far it is ahead, and whether to try further values."""
    best = tried[chosen]
    seeds = len(best.validation)
    over = f" over {seeds} seeds" if seeds > 1 else ""
    words = [f"Take {' '.join(best.overrides)}: {percent_spread(best.mean, best.deviation)}% on validation{over}."]
    others = [one for number, one in enumerate(tried) if number != chosen]
    if others:
        words.append(_lead(axes, best, max(others, key=lambda one: one.mean)))
    if all(one.mean == best.mean for one in others):
        return " ".join(words)
    for axis, place in zip(axes, best.places, strict=True):
        edge = _edge(axis, sorted({one.places[axes.index(axis)] for one in tried}), place)
        words += [edge] if edge else []
    return " ".join(words)


def score_test(cards: Sequence[Scorecard]) -> tuple[Scored, ...]:
    """The models of the chosen setting's scorecards, one card a seed."""
    scored = []
    for entry in cards[0].entries:
        found = [next((one for one in card.entries if one.name == entry.name), None) for card in cards]
        accuracies = [one.accuracy for one in found if one is not None]
        gaps = [one.difference for card in cards for one in card.comparisons if one.other == entry.name]
        middle, deviation = spread(accuracies)
        difference, difference_deviation = spread(gaps) if gaps else (None, None)
        scored.append(
            Scored(
                name=entry.name,
                role=entry.role,
                accuracies=tuple(accuracies),
                mean=middle,
                deviation=deviation,
                difference=difference,
                difference_deviation=difference_deviation,
                ahead=sum(gap > 0 for gap in gaps) if gaps else None,
            )
        )
    return tuple(scored)


def to_table(report: SweepReport) -> Table:
    """Every setting, the best first and in bold."""
    return terminal_table(_header(report), _rows(report), numbers_from=1 + len(report.axes), bold=BEST)


def to_test_table(report: SweepReport) -> Table:
    """The chosen setting on test, with its controls."""
    return terminal_table(_TEST_HEADER, _test_rows(report), numbers_from=2, bold=report.test[_student(report)].name)


def to_markdown(report: SweepReport, *, plot: str = "") -> str:
    of = f" of {report.grid_size}" if len(report.tried) < report.grid_size else ""
    tried = f"{len(report.tried)}{of} settings"
    seeds = ", ".join(map(str, report.seeds))
    keys = "\n".join(
        f"- **{axis.name}**: {' and '.join(f'`{key}`' for key in axis.keys)}, "
        + ", ".join(f"{shown} (`{value}`)" if shown != str(value) else shown for value, shown in _values(axis))
        for axis in report.axes
    )
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    made = f"Made on {report.created.isoformat()} with {versions}, on {report.hardware}."
    cards = ", ".join(f"`{card}`" for card in report.scorecards)
    parts = [
        f"# Sweep: {report.recipe}",
        f"**{report.advice}**",
        f"{tried}, {report.metric} on {report.validation_examples:,} validation examples, training seeds {seeds}.",
        keys,
        markdown_table(_header(report), _rows(report), numbers_from=1 + len(report.axes), bold=BEST),
        *([f"![Validation accuracy against each key]({plot})"] if plot else []),
        f"## The chosen one on {report.test_examples:,} test examples",
        markdown_table(_TEST_HEADER, _test_rows(report), numbers_from=2, bold=report.test[_student(report)].name),
        "\n".join(f"- {verdict}" for verdict in report.verdicts),
        f"Scorecards: {cards}.",
        "## Notes",
        "\n".join(f"- {note}" for note in (*report.notes, CHOICE_NOTE, made)),
    ]
    return "\n\n".join(parts) + "\n"


def save_report(folder: Path, report: SweepReport, *, plot: str = "") -> None:
    """Writes ``sweep.md``, then ``sweep.json``, each whole or not at all."""
    write_text(folder / "sweep.md", to_markdown(report, plot=plot))
    write_json(folder / "sweep.json", report.model_dump(mode="json"))


def _lead(axes: Sequence[AxisRecord], best: Tried, other: Tried) -> str:
    """How far the best is ahead of the next, on the same seeds."""
    gaps = [mine - theirs for mine, theirs in zip(best.validation, other.validation, strict=True)]
    middle, deviation = spread(gaps)
    names = [
        f"{axis.name}={axis.shown[place]}"
        for axis, place, mine in zip(axes, other.places, best.places, strict=True)
        if place != mine
    ]
    if not any(gaps):
        return f"The next ({', '.join(names)}) is level with it: this tells nothing apart."
    lead = f"It is {points_spread(middle, deviation)} points ahead of the next ({', '.join(names)})"
    if deviation is None:
        return f"{lead}, on one seed; --seeds 3 would tell whether that lasts."
    return f"{lead}, on {sum(gap > 0 for gap in gaps)} of {len(gaps)} seeds."


def _edge(axis: AxisRecord, tried: Sequence[int], place: int) -> str:
    """A word of advice where the best number is the largest or the smallest that was tried."""
    values = [axis.values[one] for one in tried]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < max(2, len(values)):
        return ""
    for bound, word in ((max(numbers), "larg"), (min(numbers), "small")):
        if axis.values[place] == bound:
            return f"{axis.name} {axis.shown[place]} is the {word}est that was tried: try {word}er ones too."
    return ""


def _student(report: SweepReport) -> int:
    return next(number for number, one in enumerate(report.test) if one.difference is None)


def _values(axis: AxisRecord) -> list[tuple[JsonValue, str]]:
    return list(zip(axis.values, axis.shown, strict=True))


def _header(report: SweepReport) -> list[str]:
    spread_of = "validation %\nmean ± sd" if len(report.seeds) > 1 else "validation %"
    return ["", *(axis.name for axis in report.axes), spread_of, "parameters", "train s"]


def _rows(report: SweepReport) -> list[list[str]]:
    """The best first; of equals the one that stands first in the grid, as it was chosen."""
    return [
        [
            BEST if tried is report.best else "",
            *report.shown(tried),
            percent_spread(tried.mean, tried.deviation),
            short_count(tried.parameters),
            short_number(tried.train_seconds),
        ]
        for tried in sorted(report.tried, key=lambda one: -one.mean)
    ]


_TEST_HEADER = ["model", "role", "test %", "student minus\nit, points", "ahead on\nseeds"]


def _test_rows(report: SweepReport) -> list[list[str]]:
    return [
        [
            one.name,
            one.role,
            percent_spread(one.mean, one.deviation),
            "-" if one.difference is None else points_spread(one.difference, one.difference_deviation),
            "-" if one.ahead is None else f"{one.ahead} of {len(one.accuracies)}",
        ]
        for one in report.test
    ]
