"""Rows: one example and one target each, tokenised once."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from distill_llm.core.errors import DataError

if TYPE_CHECKING:
    from distill_llm.core.example import Example, Target, TeacherAnswer
    from distill_llm.data.view import StudentView
    from distill_llm.models.picture import Picture
    from distill_llm.tasks.base import Task

LabelSource = Literal["gold", "teacher", "gold_else_teacher"]
_WHOSE: Mapping[LabelSource, str] = {"gold": "gold", "teacher": "teacher's", "gold_else_teacher": "gold or teacher's"}


@dataclass(frozen=True, slots=True)
class RowView:
    """A row as a teacher with a view of its own reads it.

    ``places``: for each of the row's label tokens, which of ``label_ids`` is its counterpart; -1 for none.
    ``picture``: what is read in place of ``input_ids``, which are empty then.
    """

    input_ids: Sequence[int]
    label_ids: Sequence[int]
    places: Sequence[int]
    prefix_ids: Sequence[int] = ()
    picture: Picture | None = None

    @property
    def num_tokens(self) -> int:
        return _num_input_tokens(self) + len(self.prefix_ids) + len(self.label_ids)


@runtime_checkable
class Viewer(Protocol):
    """How a teacher reads rows."""

    def reads(self, target: Target) -> bool:
        """Whether it is asked about rows of this target at all."""
        ...

    def views(
        self, examples: Sequence[Example], target: Target, texts: Sequence[str], labels: Sequence[Sequence[int]]
    ) -> Sequence[RowView | None]:
        """One for each example with the text that the student writes, of which it learns the tokens ``labels``; None
        where it has nothing to say. The rationale of each is the one that its row is about, None where there is none.
        """
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """``example`` is the example's place in the split; ``label_ids`` end with the end-of-sequence token.

    ``agreement`` is that of the teacher's votes on the example; 1 where it had none. ``prefix_ids`` are what the
    decoder reads before it writes ``label_ids``; no term looks at them. ``views``: the row as teachers with a view of
    their own read it, by name; without those that are not asked about it. ``picture``: what is read in place of
    ``input_ids``, which are empty then.
    """

    example: int
    target: Target
    input_ids: Sequence[int]
    label_ids: Sequence[int]
    agreement: float = 1.0
    prefix_ids: Sequence[int] = ()
    views: Mapping[str, RowView] = field(default_factory=dict)
    picture: Picture | None = None

    @property
    def num_tokens(self) -> int:
        return self.num_input_tokens + self.num_target_tokens

    @property
    def num_input_tokens(self) -> int:
        """Tokens of the text, or states that an encoder makes of the picture."""
        return _num_input_tokens(self)

    @property
    def num_target_tokens(self) -> int:
        return len(self.prefix_ids) + len(self.label_ids)

    @property
    def key(self) -> int:
        """63 bits of all that a model beside the student may see of the row; equal rows have equal keys."""
        views = (ids for name in sorted(self.views) for ids in (self.views[name].input_ids, self.views[name].label_ids))
        parts = (self.input_ids, self.prefix_ids, self.label_ids, *views)
        content = array("q", [*map(len, parts), *(token for ids in parts for token in ids)]).tobytes()
        pictures = (one.picture.content for one in (self, *self.views.values()) if one.picture is not None)
        digest = hashlib.blake2b(self.target.encode() + content + b"".join(pictures), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1

    def tokens_for(self, teacher: str) -> int:
        """Tokens that this teacher reads where it is asked about the row."""
        return self.views[teacher].num_tokens if teacher in self.views else self.num_tokens


def _num_input_tokens(row: Row | RowView) -> int:
    if row.picture is None or len(row.input_ids):  # a text has places for what is made of the picture
        return len(row.input_ids)
    return row.picture.num_tokens


@dataclass(frozen=True, slots=True)
class RowSet:
    """The rows of a training split, in example order, with what was cut."""

    rows: tuple[Row, ...]
    inputs_cut: int
    targets_cut: int

    def count(self) -> dict[Target, int]:
        return dict(Counter(row.target for row in self.rows))


def learned_label(example: Example, answer: TeacherAnswer | None, label_from: LabelSource) -> str | None:
    """The label that the student learns: gold, or the teacher's vote; None where there is none."""
    voted = answer.label if answer is not None else None
    gold_first = label_from == "gold_else_teacher" and example.label is not None
    return example.label if label_from == "gold" or gold_first else voted


def target_texts(
    example: Example, answer: TeacherAnswer | None, target: Target, *, task: Task, label_from: LabelSource
) -> list[str]:
    """What the student should write for ``target``: one text a label, one a kept rationale, none where unknown."""
    label = learned_label(example, answer, label_from)
    rationales = answer.rationales if answer is not None else ()
    if target == "rationale":
        return list(rationales)
    if label is None:
        return []
    if target == "label":
        return [label]
    return [f"{rationale} {task.answer_sentence(label, example)}" for rationale in rationales]


def build_rows(
    examples: Sequence[Example],
    answers: Mapping[str, TeacherAnswer],
    *,
    task: Task,
    view: StudentView,
    targets: Sequence[Target],
    label_from: LabelSource,
    viewers: Mapping[str, Viewer] | None = None,
) -> RowSet:
    """``viewers``: teachers with a view of their own, by name.

    Raises DataError where a target that the objective wants has no row at all.
    """
    found: list[Row] = []
    inputs_cut = targets_cut = 0
    for target in targets:
        owners, texts = [], []
        for index, example in enumerate(examples):
            written = target_texts(example, answers.get(example.id), target, task=task, label_from=label_from)
            owners += [index] * len(written)
            texts += written
        if not texts:
            raise DataError(_nothing_to_learn(target, label_from, len(examples)))
        owning = [examples[index] for index in owners]
        pictures, cut = view.pictures(owning, target)
        inputs_cut += cut
        inputs, cut = view.inputs([] if pictures else [example.input for example in owning], target)
        inputs_cut += cut
        labels, cut = view.targets(texts)
        targets_cut += cut
        prefix = tuple(view.decoder_prefix(target))
        agreed = [answers[id].agreement if (id := examples[index].id) in answers else 1.0 for index in owners]
        shown = _shown(examples, answers, owners, target) if viewers else []
        views = _views(viewers or {}, shown, target, texts, labels)
        read = [((), picture) for picture in pictures] or [(ids, None) for ids in inputs]
        parts = zip(owners, read, labels, agreed, views, strict=True)
        found += [
            Row(i, target, ids, label, agreement, prefix, own, picture)
            for i, (ids, picture), label, agreement, own in parts
        ]
    found.sort(key=lambda row: row.example)
    return RowSet(tuple(found), inputs_cut, targets_cut)


def _shown(
    examples: Sequence[Example], answers: Mapping[str, TeacherAnswer], owners: Sequence[int], target: Target
) -> list[Example]:
    """The example of each row, with the rationale that the row is about: a label's is the first that was kept."""
    found: list[Example] = []
    seen: Counter[int] = Counter()
    for owner in owners:
        example = examples[owner]
        kept = answers[example.id].rationales if example.id in answers else ()
        found.append(replace(example, rationale=kept[0 if target == "label" else seen[owner]] if kept else None))
        seen[owner] += 1
    return found


def _views(
    viewers: Mapping[str, Viewer],
    examples: Sequence[Example],
    target: Target,
    texts: Sequence[str],
    labels: Sequence[Sequence[int]],
) -> list[dict[str, RowView]]:
    found: list[dict[str, RowView]] = [{} for _ in texts]
    for name, viewer in viewers.items():
        if viewer.reads(target):
            for own, view in zip(found, viewer.views(examples, target, texts, labels), strict=True):
                if view is not None:
                    own[name] = view
    return found


def _nothing_to_learn(target: Target, label_from: LabelSource, num_examples: int) -> str:
    if target == "label":
        what = f"a {_WHOSE[label_from]} label"
        do = "Set label_from: teacher (with a `rationales` section) for unlabelled data, or gold for labelled data."
    else:
        what = "a kept rationale" + ("" if target == "rationale" else f" and a {_WHOSE[label_from]} label")
        do = "Add a `rationales` section, loosen its `keep` rules, or remove the objective's terms on this target."
    return f"objective: the target '{target}' has no row: none of the {num_examples} training examples has {what}. {do}"
