"""The scorecard of a run: what each model scores and costs, and whether distilling was worth it.

Pure functions over scores that are already there; no model is loaded. Differences are fractions in the data classes
and percentage points in text.
"""

from __future__ import annotations

import datetime
import functools
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill_llm.core.errors import ConfigError, DataError, StorageError
from distill_llm.core.files import read_json, write_json, write_text
from distill_llm.evaluation.avalanche import Avalanche, to_avalanche_markdown
from distill_llm.evaluation.classes import ClassRecall, class_markdown, recall_of_classes
from distill_llm.evaluation.statistics import RESAMPLED_FROM, accuracy_interval, mcnemar_exact, paired_difference
from distill_llm.evaluation.text_tables import (
    markdown_table,
    p_value,
    percent,
    percent_interval,
    points_interval,
    short_bytes,
    short_count,
    short_number,
    terminal_table,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.table import Table

Role = Literal["teacher", "assistant", "student", "control"]

FILE_NAME = "scorecard.json"
ONE_RUN_NOTE = (
    "The intervals are over test examples of one training run. They do not cover the spread between seeds: train with "
    "several seeds before you rely on a small difference."
)
_ROLES: tuple[Role, ...] = ("teacher", "assistant", "student", "control")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Facts(_Record):
    """What is known of a model before it is scored. None stands for unknown, such as the size of a replayed teacher."""

    role: Role
    description: str = Field(description="one line, such as 'labels only, same steps'")
    parameters: int | None = Field(default=None, ge=1)
    bytes: int | None = Field(default=None, ge=1, description="weights on disk")
    train_seconds: float | None = Field(default=None, ge=0)
    train_steps: int | None = Field(default=None, ge=0)
    train_tokens: int | None = Field(default=None, ge=0)
    learning_rate: float | None = Field(default=None, ge=0, description="the one chosen on validation")
    validation_accuracy: float | None = Field(default=None, ge=0, le=1)
    examples_per_second: float | None = Field(default=None, ge=0)


class Entry(Facts):
    """A model with its accuracy on the reported split and the bounds of its interval."""

    name: str
    accuracy: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    num_examples: int = Field(ge=1)


class Comparison(_Record):
    """Accuracy of the main student minus that of another model, on the same examples."""

    student: str
    other: str
    difference: float = Field(ge=-1, le=1)
    low: float = Field(ge=-1, le=1)
    high: float = Field(ge=-1, le=1)
    mcnemar_p: float = Field(ge=0, le=1)
    num_examples: int = Field(ge=1)

    @property
    def reading(self) -> Literal["better", "worse", "not shown"]:
        """What the interval says of the student: all of it on one side of 0, or neither."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "not shown"


class Scorecard(_Record):
    """``student`` names the main student; ``comparisons`` hold it against every other entry."""

    task: str
    metric: str
    split: str = "test"
    student: str
    confidence: float = Field(gt=0, lt=1)
    entries: tuple[Entry, ...] = Field(min_length=1)
    comparisons: tuple[Comparison, ...]
    classes: tuple[ClassRecall, ...] = ()
    teacher_retention: float | None = Field(description="student accuracy / accuracy of the strongest teacher")
    size_ratio: float | None = Field(description="parameters of that teacher / parameters of the student")
    avalanche: Avalanche | None = Field(default=None, description="of a run with several stages")
    verdict: str
    notes: tuple[str, ...]
    versions: dict[str, str]
    hardware: str
    created: datetime.date


def build_scorecard(
    results: Mapping[str, tuple[Facts, Sequence[bool]]],
    *,
    student: str,
    task: str,
    metric: str,
    hardware: str,
    created: datetime.date,
    versions: Mapping[str, str],
    seed: int,
    split: str = "test",
    notes: Sequence[str] = (),
    avalanche: Avalanche | None = None,
    resamples: int = 10_000,
    confidence: float = 0.95,
    labels: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> Scorecard:
    """Scores every model of ``results``: its name, its facts, and for each example whether it was answered correctly.

    The booleans of all models stand for the same examples in the same order. ``labels``: their gold labels, where a
    table of classes is wanted; ``left_out``: those that students were kept from. Entries come out as teachers,
    assistants, students, controls. Raises ConfigError for a main student that is not there, DataError for answers that
    do not align.
    """
    _check(results, student)
    entries = []
    for name, (facts, correct) in sorted(results.items(), key=lambda item: _ROLES.index(item[1][0].role)):
        score = accuracy_interval(correct, seed=seed, resamples=resamples, confidence=confidence)
        bounds = {"accuracy": score.estimate, "low": score.low, "high": score.high, "num_examples": len(correct)}
        entries.append(Entry(name=name, **facts.model_dump(), **bounds))
    compare = functools.partial(_compare, results, student, seed=seed, resamples=resamples, confidence=confidence)
    comparisons = [compare(entry.name) for entry in entries if entry.name != student]
    main = next(entry for entry in entries if entry.name == student)
    teacher = _strongest(entries, "teacher")
    return Scorecard(
        task=task,
        metric=metric,
        split=split,
        student=student,
        confidence=confidence,
        entries=tuple(entries),
        comparisons=tuple(comparisons),
        classes=recall_of_classes({name: right for name, (_, right) in results.items()}, labels, left_out),
        teacher_retention=_retention(main, teacher),
        size_ratio=_size_ratio(main, teacher),
        avalanche=avalanche,
        verdict=verdict(student, entries, comparisons, split=split),
        notes=(*notes, _interval_note(resamples, confidence), ONE_RUN_NOTE),
        versions=dict(versions),
        hardware=hardware,
        created=created,
    )


def verdict(student: str, entries: Sequence[Entry], comparisons: Sequence[Comparison], *, split: str = "test") -> str:
    """One sentence: whether distilling was worth it, as far as the intervals say.

    Worth it: better than every control, each by its own interval. As all must hold, testing several controls needs no
    correction (intersection-union test, Berger 1982, Technometrics 24, 295). Not worth it: worse than some control.
    Not shown: anything between. It names the control that decides: the strongest, or the one that stands against it.
    """
    by_name = {entry.name: entry for entry in entries}
    main = by_name[student]
    controls = [comparison for comparison in comparisons if by_name[comparison.other].role == "control"]
    score = f"'{student}' answers {percent(main.accuracy)}% of {main.num_examples:,} {split} examples correctly"
    ending = _against_teacher(main, _strongest(entries, "teacher"))
    if not controls:
        return (
            f"Whether distilling was worth it cannot be judged: {score}, but nothing was compared with it, as there is "
            f"no control{ending}."
        )
    reading = next(
        reading for reading in ("worse", "not shown", "better") if any(c.reading == reading for c in controls)
    )
    decides = min((c for c in controls if c.reading == reading), key=lambda c: (c.difference, c.low))
    opening, remark = {
        "worse": ("Distilling was not worth it", ""),
        "not shown": ("It is not shown that distilling was worth it", ", an interval that includes 0"),
        "better": ("Distilling was worth it", f", the strongest of {len(controls)}" if len(controls) > 1 else ""),
    }[reading]
    gap = points_interval(decides.difference, decides.low, decides.high)
    return f"{opening}: {score}, {gap} points against the control '{decides.other}'{remark}{ending}."


def to_table(scorecard: Scorecard) -> Table:
    """The entries, for a terminal of 80 columns or more; the main student in bold."""
    return terminal_table(
        _model_header(scorecard), map(_model_row, scorecard.entries), numbers_from=2, bold=scorecard.student
    )


def to_comparison_table(scorecard: Scorecard) -> Table:
    """The main student against every other entry, in percentage points."""
    return terminal_table(_comparison_header(scorecard), map(_comparison_row, scorecard.comparisons), numbers_from=1)


def models_markdown(scorecard: Scorecard) -> str:
    """The entries as a Markdown table."""
    rows = map(_model_row, scorecard.entries)
    return markdown_table(_model_header(scorecard), rows, numbers_from=2, bold=scorecard.student)


def comparisons_markdown(scorecard: Scorecard) -> str:
    """The comparisons as a Markdown table; empty where there are none."""
    rows = map(_comparison_row, scorecard.comparisons)
    return markdown_table(_comparison_header(scorecard), rows, numbers_from=1) if scorecard.comparisons else ""


def to_markdown(scorecard: Scorecard) -> str:
    parts = [
        f"# Scorecard: {scorecard.task}",
        f"**{scorecard.verdict}**",
        f"{scorecard.metric} on {scorecard.entries[0].num_examples:,} {scorecard.split} examples.",
        models_markdown(scorecard),
        "\n".join(f"- {entry.name}: {_details(entry)}" for entry in scorecard.entries),
    ]
    if scorecard.comparisons:
        parts += ["## Comparisons", comparisons_markdown(scorecard)]
    if scorecard.classes:
        parts += ["## Classes", class_markdown(scorecard.classes)]
    if scorecard.avalanche is not None:
        parts += ["## Error avalanche", to_avalanche_markdown(scorecard.avalanche)]
    versions = ", ".join(f"{name} {version}" for name, version in scorecard.versions.items())
    made = f"Made on {scorecard.created.isoformat()} with {versions}, on {scorecard.hardware}."
    parts += ["## Notes", "\n".join(f"- {note}" for note in (*scorecard.notes, made))]
    return "\n\n".join(parts) + "\n"


def save_scorecard(folder: Path, scorecard: Scorecard) -> Path:
    """Writes ``scorecard.md``, then ``scorecard.json``, each whole or not at all; gives the path of the JSON."""
    write_text(folder / "scorecard.md", to_markdown(scorecard))
    path = folder / FILE_NAME
    write_json(path, scorecard.model_dump(mode="json"))
    return path


def load_scorecard(path: Path) -> Scorecard:
    """Reads a ``scorecard.json``, or the one in a folder. Raises StorageError where it is missing or damaged."""
    file = path / FILE_NAME if path.is_dir() else path
    try:
        return Scorecard.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise StorageError(
            f"{file}: not a scorecard: {where}: {first['msg']} ({error.error_count()} problems in all). It was changed "
            "by hand, damaged, or written by another version: delete it and run the recipe again to make it anew."
        ) from None


def installed_versions(further: Sequence[str] = ()) -> dict[str, str]:
    """Versions of what a score depends on, and of ``further`` packages; nothing is imported to find them."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "distill-llm", *further):
        try:
            found[name.replace("-", "_")] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name.replace("-", "_")] = "not installed"
    return found


def _check(results: Mapping[str, tuple[Facts, Sequence[bool]]], student: str) -> None:
    students = sorted(name for name, (facts, _) in results.items() if facts.role == "student")
    if student not in students:
        raise ConfigError(f"scorecard: the main student '{student}' is not one of the students scored: {students}.")
    expected = len(results[student][1])
    for name, (_, correct) in results.items():
        if len(correct) != expected:
            raise DataError(
                f"scorecard: '{name}' has {len(correct)} answers and '{student}' has {expected}. Expected all models "
                "on the same examples in the same order: predict the same split with each."
            )


def _compare(
    results: Mapping[str, tuple[Facts, Sequence[bool]]],
    student: str,
    other: str,
    *,
    seed: int,
    resamples: int,
    confidence: float,
) -> Comparison:
    first, second = results[student][1], results[other][1]
    gap = paired_difference(first, second, seed=seed, resamples=resamples, confidence=confidence)
    return Comparison(
        student=student,
        other=other,
        difference=gap.estimate,
        low=gap.low,
        high=gap.high,
        mcnemar_p=mcnemar_exact(first, second),
        num_examples=len(first),
    )


def _interval_note(resamples: int, confidence: float) -> str:
    return (
        f"An interval holds {100 * confidence:g}% of {resamples:,} bootstrap resamples of the examples; where fewer "
        f"than {RESAMPLED_FROM} examples are right, are wrong, or tell two models apart, it is a closed form instead."
    )


def _strongest(entries: Sequence[Entry], role: Role) -> Entry | None:
    return max((entry for entry in entries if entry.role == role), key=lambda entry: entry.accuracy, default=None)


def _retention(main: Entry, teacher: Entry | None) -> float | None:
    return main.accuracy / teacher.accuracy if teacher and teacher.accuracy else None


def _size_ratio(main: Entry, teacher: Entry | None) -> float | None:
    return teacher.parameters / main.parameters if teacher and teacher.parameters and main.parameters else None


def _against_teacher(main: Entry, teacher: Entry | None) -> str:
    """The clause on retention and size, as far as they are known; empty without a teacher."""
    retention, ratio = _retention(main, teacher), _size_ratio(main, teacher)
    if teacher is None or retention is None:
        return ""
    size = "" if ratio is None else f", which is {short_number(ratio)} times as large"
    name = "the teacher" if teacher.name == "teacher" else f"the teacher '{teacher.name}'"
    return f"; it reaches {percent(retention)}% of the accuracy of {name}{size}"


def _model_header(scorecard: Scorecard) -> list[str]:
    interval = f"accuracy %\n[{100 * scorecard.confidence:g}% interval]"
    return ["model", "role", interval, "parameters", "bytes", "train s", "examples\n/s"]


def _model_row(entry: Entry) -> list[str]:
    return [
        entry.name,
        entry.role,
        percent_interval(entry.accuracy, entry.low, entry.high),
        short_count(entry.parameters),
        short_bytes(entry.bytes),
        short_number(entry.train_seconds),
        short_number(entry.examples_per_second),
    ]


def _comparison_header(scorecard: Scorecard) -> list[str]:
    interval = f"points\n[{100 * scorecard.confidence:g}% interval]"
    return [f"{scorecard.student} against", interval, "McNemar\np", "student is"]


def _comparison_row(comparison: Comparison) -> list[str]:
    gap = points_interval(comparison.difference, comparison.low, comparison.high)
    return [comparison.other, gap, p_value(comparison.mcnemar_p), comparison.reading]


def _details(entry: Entry) -> str:
    """What the table has no column for."""
    known = [
        (entry.train_steps, lambda steps: f"{steps:,} steps"),
        (entry.train_tokens, lambda tokens: f"{short_count(tokens)} tokens"),
        (entry.learning_rate, lambda rate: f"learning rate {rate:g}"),
        (entry.validation_accuracy, lambda share: f"{percent(share)}% on validation"),
    ]
    return "; ".join([entry.description, *(text(value) for value, text in known if value is not None)])
