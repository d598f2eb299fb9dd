"""What an export is worth: the same answers as the student, its size and its speed.

Differences are fractions in the data classes and percentage points in text.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill_llm.core.errors import StorageError
from distill_llm.core.files import read_json, write_json
from distill_llm.evaluation.speed import Speed
from distill_llm.evaluation.statistics import accuracy_interval, paired_difference
from distill_llm.evaluation.text_tables import (
    UNKNOWN,
    markdown_table,
    percent,
    points_interval,
    short_bytes,
    short_number,
    terminal_table,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.table import Table

FILE_NAME = "report.json"
STUDENT_ROW = "student, PyTorch"
_SHOWN = 5


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Answers(_Record):
    """What a model wrote for each example, whether that was right, and what it took; ``made_of`` decides all of it."""

    made_of: str
    texts: tuple[str, ...]
    right: tuple[bool, ...]
    speed: Speed
    bytes: int | None = Field(ge=1, description="weights and graphs on disk")


class Score(_Record):
    """Accuracy with its interval, and what the model takes."""

    accuracy: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    bytes: int | None = Field(ge=1)
    speed: Speed


class Loss(_Record):
    """Accuracy of the student minus that of the export, on the same examples."""

    points: float = Field(ge=-1, le=1)
    low: float = Field(ge=-1, le=1)
    high: float = Field(ge=-1, le=1)


class Other(_Record):
    """An example that the two answer otherwise."""

    example_id: str
    student: str
    export: str


class TeacherScore(_Record):
    """What the scorecard knows of a teacher, on the whole test split."""

    name: str
    accuracy: float = Field(ge=0, le=1)
    bytes: int | None = None
    examples_per_second: float | None = None


class ExportReport(_Record):
    """One export beside its student, both greedy, both on this machine's CPU."""

    format: str
    runtime: str
    made_of: str = Field(description="changes with the weights, the format, and how it was asked")
    num_examples: int = Field(ge=1)
    same_answers: float = Field(ge=0, le=1, description="share of texts that are the student's to the letter")
    loss: Loss
    export: Score
    student: Score
    teachers: tuple[TeacherScore, ...]
    others: tuple[Other, ...] = Field(description="the first few examples that the two answer otherwise")
    confidence: float = 0.95
    threads: int = Field(ge=1)
    hardware: str
    versions: dict[str, str]
    created: datetime.date


def build_report(
    export: Answers,
    student: Answers,
    *,
    name: str,
    runtime: str,
    example_ids: Sequence[str],
    teachers: Sequence[TeacherScore],
    seed: int,
    resamples: int,
    threads: int,
    hardware: str,
    versions: Mapping[str, str],
    created: datetime.date,
) -> ExportReport:
    """Holds an export against its student; both were asked the examples of ``example_ids``."""
    same = [one == other for one, other in zip(export.texts, student.texts, strict=True)]
    gap = paired_difference(student.right, export.right, seed=seed, resamples=resamples)
    triples = zip(example_ids, student.texts, export.texts, strict=True)
    others = [Other(example_id=key, student=one, export=other) for key, one, other in triples if one != other]
    return ExportReport(
        format=name,
        runtime=runtime,
        made_of=export.made_of,
        num_examples=len(same),
        same_answers=sum(same) / len(same),
        loss=Loss(points=gap.estimate, low=gap.low, high=gap.high),
        export=_score(export, seed, resamples),
        student=_score(student, seed, resamples),
        teachers=tuple(teachers),
        others=tuple(others[:_SHOWN]),
        threads=threads,
        hardware=hardware,
        versions=dict(versions),
        created=created,
    )


def save_report(folder: Path, report: ExportReport) -> None:
    write_json(folder / FILE_NAME, report.model_dump(mode="json"))


def read_report(folder: Path) -> ExportReport | None:
    """The report in a folder; None where there is none. Raises StorageError where it is damaged."""
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        return ExportReport.model_validate(read_json(path))
    except ValidationError as error:
        raise StorageError(
            f"{path}: no report of this version ({error.error_count()} problems). Delete its folder and export again."
        ) from None


def export_table(reports: Sequence[ExportReport]) -> Table:
    """The exports beside student and teachers, for a terminal."""
    return terminal_table(_header(reports[0]), _rows(reports), numbers_from=1, bold=STUDENT_ROW)


def export_markdown(reports: Sequence[ExportReport]) -> str:
    """The same as Markdown."""
    return markdown_table(_header(reports[0]), _rows(reports), numbers_from=1, bold=STUDENT_ROW)


def export_notes(reports: Sequence[ExportReport]) -> list[str]:
    """What the table has no room for."""
    first, timed = reports[0], reports[0].export.speed.timed_examples
    notes = [
        f"{first.num_examples:,} test examples, greedy, in the export's own runtime; "
        f"{timed} of them one at a time (p50 and p95 of their milliseconds), all in batches "
        "(examples a second). "
        f"{first.threads} {'thread' if first.threads == 1 else 'threads'} each, on {first.hardware}.",
        "The interval of lost points is over examples of one student.",
    ]
    if first.teachers:
        notes.append("A teacher's row is the scorecard's, of the whole test split; its speed is that of batches.")
    return notes


def _score(answers: Answers, seed: int, resamples: int) -> Score:
    found = accuracy_interval(answers.right, seed=seed, resamples=resamples)
    bounds = {"accuracy": found.estimate, "low": found.low, "high": found.high}
    return Score(**bounds, bytes=answers.bytes, speed=answers.speed)


def _header(report: ExportReport) -> list[str]:
    interval = f"points lost\n[{100 * report.confidence:g}% interval]"
    return ["format", "same\n%", "right\n%", interval, "on disk", "ms\np50/p95", "per\ns"]


def _rows(reports: Sequence[ExportReport]) -> list[list[str]]:
    rows = [_row(STUDENT_ROW, reports[0].student)]
    for report in reports:
        lost = points_interval(report.loss.points, report.loss.low, report.loss.high)
        rows.append(_row(report.format, report.export, percent(report.same_answers), lost))
    for teacher in reports[0].teachers:
        size, speed = short_bytes(teacher.bytes), short_number(teacher.examples_per_second)
        rows.append([teacher.name, UNKNOWN, percent(teacher.accuracy), UNKNOWN, size, UNKNOWN, speed])
    return rows


def _row(name: str, score: Score, same: str = UNKNOWN, lost: str = UNKNOWN) -> list[str]:
    speed = score.speed
    times = f"{short_number(speed.median_ms)}/{short_number(speed.p95_ms)}"
    size, many = short_bytes(score.bytes), short_number(speed.examples_per_second)
    return [name, same, percent(score.accuracy), lost, size, times, many]
