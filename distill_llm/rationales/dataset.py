"""The rationale data set: one row a completion, with where it came from and what became of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from distill_llm.core.errors import StorageError
from distill_llm.core.example import TeacherAnswer
from distill_llm.core.files import atomic
from distill_llm.rationales.keep import Chain
from distill_llm.rationales.parse import Parsed, parse
from distill_llm.rationales.vote import vote

if TYPE_CHECKING:
    from pathlib import Path

    from distill_llm.rationales.keep import Keep
    from distill_llm.tasks.base import Task
    from distill_llm.teachers.base import Completion, Request


@dataclass(frozen=True, slots=True)
class RationaleRow:
    """One completion after parsing, voting and keeping. ``outcome`` is "kept", or why it was not."""

    example_id: str
    split: str
    sample: int
    input: str
    gold_label: str | None
    completion_label: str | None
    teacher_label: str | None
    agreement: float
    rationale: str
    outcome: str
    tokens_in: int
    tokens_out: int
    key: str


def make_rows(
    requests: Sequence[Request], completions: Mapping[str, Completion], task: Task, rules: Sequence[Keep]
) -> list[RationaleRow]:
    """Parses, votes and keeps. Pure: changing a rule asks no teacher."""
    parsed = {r.key: parse(completions[r.key].text, task, r.example) for r in requests}
    by_example: dict[str, list[Parsed]] = defaultdict(list)
    for request in requests:
        by_example[request.example.id].append(parsed[request.key])
    votes = {example_id: vote(answers, task.same) for example_id, answers in by_example.items()}
    rows = []
    for request in requests:
        example, answer = request.example, parsed[request.key]
        label, agreement = votes[example.id]
        rows.append(
            RationaleRow(
                example_id=example.id,
                split=request.split,
                sample=request.sample,
                input=example.input,
                gold_label=example.label,
                completion_label=answer.label,
                teacher_label=label,
                agreement=agreement,
                rationale=answer.rationale,
                outcome=_outcome(answer, label, agreement, example.label, task, rules),
                tokens_in=completions[request.key].tokens_in,
                tokens_out=completions[request.key].tokens_out,
                key=request.key,
            )
        )
    return rows


def _outcome(
    answer: Parsed, voted: str | None, agreement: float, gold: str | None, task: Task, rules: Sequence[Keep]
) -> str:
    if answer.problem or answer.label is None or voted is None:
        return f"unparsable: {answer.problem}" if answer.label is None else answer.problem
    chain = Chain(answer.rationale, answer.label, voted, agreement, gold, task.same)
    for rule in rules:
        if not rule.keeps(chain):
            return f"rule: {type(rule).model_fields['kind'].default}"
    return "kept"


def teacher_answers(rows: Sequence[RationaleRow]) -> dict[str, TeacherAnswer]:
    """What a student learns from, by example id."""
    kept: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.outcome == "kept":
            kept[row.example_id].append(row.rationale)
    return {
        row.example_id: TeacherAnswer(row.teacher_label, tuple(kept[row.example_id]), row.agreement) for row in rows
    }


def funnel(rows: Sequence[RationaleRow], task: Task) -> dict[str, int | float | None]:
    """How many completions were asked for, parsed and kept, why the others fell out, and the teacher's accuracy.

    ``accuracy`` is of the voted label over examples with a gold label; an unparsable example counts as wrong.
    """
    by_example = {row.example_id: row for row in rows}
    known = [row for row in by_example.values() if row.gold_label is not None]
    right = sum(row.teacher_label is not None and task.same(row.teacher_label, row.gold_label or "") for row in known)
    outcomes = Counter(row.outcome for row in rows)
    kept = outcomes.pop("kept", 0)
    return {
        "examples": len(by_example),
        "completions": len(rows),
        "parsed": sum(row.completion_label is not None for row in rows),
        "kept": kept,
        **{f"dropped, {reason}": number for reason, number in sorted(outcomes.items())},
        "examples_with_gold_label": len(known),
        "accuracy": right / len(known) if known else None,
        "tokens_in": sum(row.tokens_in for row in rows),
        "tokens_out": sum(row.tokens_out for row in rows),
    }


def save_rows(path: Path, rows: Sequence[RationaleRow]) -> None:
    """Parquet with one column a field of RationaleRow; ``datasets.load_dataset("parquet", ...)`` reads it."""
    import pyarrow as pa
    from pyarrow import parquet

    types = {"str": pa.string(), "str | None": pa.string(), "int": pa.int64(), "float": pa.float64()}
    schema = pa.schema([(field.name, types[str(field.type)]) for field in fields(RationaleRow)])
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=schema)
    with atomic(path) as draft:
        parquet.write_table(table, draft)


def read_rows(path: Path) -> list[RationaleRow]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return [RationaleRow(**row) for row in parquet.read_table(path).to_pylist()]
    except (pa.ArrowInvalid, TypeError, OSError) as error:
        raise StorageError(
            f"{path}: not a rationale file of this version ({error}). Delete it: it is made again from the journal, "
            "without asking the teacher."
        ) from None
