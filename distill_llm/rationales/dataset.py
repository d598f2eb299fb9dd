"""The rationale data set: one row a completion, with where it came from and what became of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

from distill_llm.core.errors import StorageError
from distill_llm.core.example import TeacherAnswer
from distill_llm.core.files import atomic
from distill_llm.rationales.keep import Chain
from distill_llm.rationales.members import Share, weights_of
from distill_llm.rationales.parse import Parsed, parse
from distill_llm.rationales.vote import vote

if TYPE_CHECKING:
    from pathlib import Path

    from distill_llm.rationales.keep import Keep
    from distill_llm.tasks.base import Task
    from distill_llm.teachers.base import Completion, Request, TokenScores

KEPT, MISSING = "kept", "not completed"
_ROWS_A_WRITE = 10_000


@dataclass(frozen=True, slots=True)
class RationaleRow:
    """One completion after parsing, voting and keeping; ``COLUMNS`` says what each field is."""

    example_id: str
    split: str
    sample: int
    hinted: bool
    input: str
    gold_label: str | None
    completion_label: str | None
    teacher_label: str | None
    agreement: float
    rationale: str
    outcome: str
    cut: bool
    tokens_in: int
    tokens_out: int
    key: str
    teacher: str = ""


_FIELDS = tuple(field.name for field in fields(RationaleRow))

COLUMNS: Mapping[str, str] = {
    "example_id": "the example that the completion answers",
    "split": "train, validation or test",
    "sample": "which completion of the example, from 0",
    "hinted": "the teacher was shown the gold label and asked to explain it",
    "input": "what a student reads",
    "gold_label": "the label that the data gives, if any",
    "completion_label": "the label that this completion states, if it can be read",
    "teacher_label": "the label that most completions of the example state (hinted ones have no vote)",
    "agreement": "the share of the example's completions that state it (of its hinted ones, in a hinted row)",
    "rationale": "the text before the answer",
    "outcome": "`kept`, or why the rationale is not learned from",
    "cut": "the completion ran into `max_new_tokens`",
    "tokens_in": "tokens of the prompt, as the teacher counts them; 0 where unknown",
    "tokens_out": "tokens that the teacher wrote; 0 where unknown",
    "teacher": "who of several teachers wrote the completion; empty where there is one",
    "key": "fingerprint of all that decided the completion; the journal knows it by this",
    "logprobs": "for each token written: token, logprob, and the likeliest tokens there (only where asked for)",
}


class Answers(Protocol):
    """Where completions are looked up by their keys."""

    def __call__(self, key: str, /) -> Completion | None: ...


@dataclass(frozen=True, slots=True)
class Judged:
    """One request with what came of it."""

    request: Request
    completion: Completion | None
    parsed: Parsed


def judge(requests: Sequence[Request], answers: Answers, task: Task) -> list[Judged]:
    """Looks completions up and parses them."""
    found = []
    for request in requests:
        completion = answers(request.key)
        parsed = Parsed("", None, MISSING)
        if completion is not None:
            parsed = parse(completion.text, task, request.example)
        found.append(Judged(request, completion, parsed))
    return found


def make_rows(
    plain: Sequence[Judged],
    hinted: Sequence[Judged],
    task: Task,
    rules: Sequence[Keep],
    say: Mapping[str, float] | None = None,
) -> list[RationaleRow]:
    """The rows of one example: votes, keeps. Pure: changing a rule asks no teacher.

    Only plain completions vote. A hinted one must reach the label that it was told, whatever the rules. ``say``: what
    each of several teachers has to say.
    """
    label, agreement = _vote(plain, task, say)
    hint_agreement = _reached(hinted, task)
    outcomes: dict[str, str] = {}
    chains: list[tuple[Judged, Chain]] = []
    for judged in (*plain, *hinted):
        gold, is_hinted = judged.request.example.label, judged.request.hinted
        chain = Chain(
            rationale=judged.parsed.rationale,
            label=judged.parsed.label,
            voted_label=gold if is_hinted else label,
            agreement=hint_agreement if is_hinted else agreement,
            gold_label=gold,
            same=task.same,
        )
        lost = _lost(judged, chain)
        if lost:
            outcomes[judged.request.key] = lost
        else:
            chains.append((judged, chain))
    outcomes |= _ruled(chains, rules)
    return [
        _row(judged, label, hint_agreement if judged.request.hinted else agreement, outcomes[judged.request.key])
        for judged in (*plain, *hinted)
    ]


def _vote(plain: Sequence[Judged], task: Task, say: Mapping[str, float] | None) -> tuple[str | None, float]:
    completed = [judged for judged in plain if judged.completion is not None]
    weights = weights_of(completed, say) if say is not None else ()
    return vote([judged.parsed for judged in completed], task.same, weights) if completed else (None, 0.0)


def _reached(hinted: Sequence[Judged], task: Task) -> float:
    """The share of hinted completions that reach the label they were told."""
    gold = hinted[0].request.example.label if hinted else None
    right = sum(j.parsed.label is not None and gold is not None and task.same(j.parsed.label, gold) for j in hinted)
    return right / len(hinted) if hinted else 0.0


def _lost(judged: Judged, chain: Chain) -> str:
    """Why a completion is out before any rule is asked; "" where it is not."""
    if judged.completion is None:
        return MISSING
    if not judged.parsed.rationale:
        return "empty" if judged.parsed.problem == "empty" else "no rationale"
    return "hint not followed" if judged.request.hinted and not chain.reaches(chain.gold_label) else ""


def _ruled(chains: Sequence[tuple[Judged, Chain]], rules: Sequence[Keep]) -> dict[str, str]:
    left = list(chains)
    outcomes: dict[str, str] = {}
    for rule in rules:
        stay = {id(chain) for chain in rule.select([chain for _, chain in left])}
        kind = type(rule).model_fields["kind"].default
        for judged, chain in left:
            if id(chain) not in stay:
                outcomes[judged.request.key] = _dropped_by(kind, judged)
        left = [(judged, chain) for judged, chain in left if id(chain) in stay]
    return outcomes | {judged.request.key: KEPT for judged, _ in left}


def _dropped_by(kind: str, judged: Judged) -> str:
    """A rule about labels drops what states none: then the reader wants to know why it could not be read."""
    unread = judged.parsed.label is None and kind in ("parsable", "agrees_with_label", "majority")
    return f"unparsable: {judged.parsed.problem}" if unread else f"rule: {kind}"


def _row(judged: Judged, label: str | None, agreement: float, outcome: str) -> RationaleRow:
    request, completion = judged.request, judged.completion
    return RationaleRow(
        example_id=request.example.id,
        split=request.split,
        sample=request.sample,
        hinted=request.hinted,
        input=request.example.input,
        gold_label=request.example.label,
        completion_label=judged.parsed.label,
        teacher_label=label,
        agreement=agreement,
        rationale=judged.parsed.rationale,
        outcome=outcome,
        cut=completion.cut if completion else False,
        tokens_in=completion.tokens_in if completion else 0,
        tokens_out=completion.tokens_out if completion else 0,
        key=request.key,
        teacher=request.teacher,
    )


def teacher_answers(rows: Iterable[RationaleRow]) -> dict[str, TeacherAnswer]:
    """What a student learns from, by example id. The agreement is that of the completions it learns from."""
    labels: dict[str, tuple[str | None, float]] = {}
    kept: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.example_id not in labels or (row.outcome == KEPT and not kept[row.example_id]):
            labels[row.example_id] = (row.teacher_label, row.agreement)
        if row.outcome == KEPT:
            kept[row.example_id].append(row.rationale)
    return {id: TeacherAnswer(label, tuple(kept[id]), agreement) for id, (label, agreement) in labels.items()}


@dataclass(slots=True)
class Funnel:
    """Counts, from what was asked to what is learned from.

    ``agreed``: completions that state the gold label, or, where none is known, the voted one. ``right``: examples
    whose vote is the gold label, of ``known`` that have one; one without a readable completion counts as wrong.
    ``teachers``: the part of each, where there are several.
    """

    examples: int = 0
    asked: int = 0
    completed: int = 0
    parsed: int = 0
    agreed: int = 0
    kept: int = 0
    kept_hinted: int = 0
    hinted: int = 0
    cut: int = 0
    examples_kept: int = 0
    known: int = 0
    right: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    teachers: dict[str, Share] = field(default_factory=dict)

    def count(self, rows: Sequence[RationaleRow], task: Task) -> None:
        """Adds the rows of one example."""
        self.examples += 1
        self.examples_kept += any(row.outcome == KEPT for row in rows)
        for row in rows:
            wanted = row.gold_label if row.gold_label is not None else row.teacher_label
            self.asked += 1
            self.completed += row.outcome != MISSING
            self.parsed += row.completion_label is not None
            self.agreed += _same(row.completion_label, wanted, task)
            self.kept += row.outcome == KEPT
            self.kept_hinted += row.outcome == KEPT and row.hinted
            self.hinted += row.hinted
            self.cut += row.cut
            self.tokens_in += row.tokens_in
            self.tokens_out += row.tokens_out
            if row.outcome != KEPT:
                self.dropped[row.outcome] += 1
        for name, share in self.teachers.items():
            share.count((row for row in rows if row.teacher == name), task)
        if rows and rows[0].gold_label is not None and any(row.outcome != MISSING for row in rows):
            self.known += 1
            self.right += _same(rows[0].teacher_label, rows[0].gold_label, task)

    @property
    def accuracy(self) -> float | None:
        return self.right / self.known if self.known else None

    def report(self) -> dict[str, Any]:
        counts = {field.name: getattr(self, field.name) for field in fields(Funnel)}  # asdict would count a Counter
        shares = {name: share.report() for name, share in counts.pop("teachers").items()}
        counts |= {"dropped": dict(sorted(self.dropped.items())), "accuracy": self.accuracy}
        return counts | ({"teachers": shares} if shares else {})


def _same(label: str | None, wanted: str | None, task: Task) -> bool:
    return label is not None and wanted is not None and task.same(label, wanted)


class RowWriter:
    """Writes rows to a Parquet file, a batch at a time."""

    def __init__(self, file: Any, schema: Any):
        self._file, self._schema = file, schema
        self._waiting: list[dict[str, Any]] = []

    def write(self, rows: Sequence[RationaleRow], scores: Sequence[TokenScores | None]) -> None:
        """``scores`` are those of the rows; they are written where the file has a column for them."""
        with_scores = "logprobs" in self._schema.names
        for row, captured in zip(rows, scores, strict=True):
            plain = {name: getattr(row, name) for name in _FIELDS}
            self._waiting.append(plain | {"logprobs": _nested(captured)} if with_scores else plain)
        if len(self._waiting) >= _ROWS_A_WRITE:
            self.flush()

    def flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            self._file.write_table(pa.Table.from_pylist(self._waiting, schema=self._schema))
            self._waiting = []


@contextmanager
def row_writer(path: Path, *, with_scores: bool = False) -> Iterator[RowWriter]:
    """Parquet with one column a field of RationaleRow; it is there when the block ends, whole, or not at all."""
    from pyarrow import parquet

    schema = _schema(with_scores)
    with atomic(path) as draft, parquet.ParquetWriter(draft, schema) as file:
        writer = RowWriter(file, schema)
        yield writer
        writer.flush()


def read_rows(path: Path) -> Iterator[RationaleRow]:
    """The rows of a rationale file, a batch at a time in memory."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = [column.name for column in fields(RationaleRow)]
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_A_WRITE, columns=columns):
                for row in batch.to_pylist():
                    yield RationaleRow(**row)
    except (pa.ArrowInvalid, TypeError, KeyError, OSError) as error:
        raise StorageError(
            f"{path}: not a rationale file of this version ({error}). Delete it: it is made again from the journal, "
            "without asking the teacher."
        ) from None


def _schema(with_scores: bool) -> Any:
    import pyarrow as pa

    types = {
        "str": pa.string(),
        "str | None": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
    }
    columns = [(column.name, types[str(column.type)]) for column in fields(RationaleRow)]
    if with_scores:
        token = [("token", pa.string()), ("logprob", pa.float64())]
        place = pa.struct([*token, ("top", pa.list_(pa.struct(token)))])
        columns.append(("logprobs", pa.list_(place)))
    return pa.schema(columns)


def _nested(scores: TokenScores | None) -> list[dict[str, Any]] | None:
    """Tokens as text: an id of the teacher's tokenizer, or the piece itself, as the backend tells them."""
    if scores is None:
        return None
    return [
        {
            "token": str(token),
            "logprob": logprob,
            "top": [{"token": str(t), "logprob": p} for t, p in zip(top_tokens, top_logprobs, strict=True)],
        }
        for token, logprob, top_tokens, top_logprobs in zip(
            scores.tokens, scores.logprobs, scores.top_tokens, scores.top_logprobs, strict=True
        )
    ]
