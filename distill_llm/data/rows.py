"""Rows: one example and one target each, tokenised once."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from distill_llm.core.errors import DataError

if TYPE_CHECKING:
    from distill_llm.core.example import Example, Target, TeacherAnswer
    from distill_llm.data.view import StudentView
    from distill_llm.tasks.base import Task

LabelSource = Literal["gold", "teacher", "gold_else_teacher"]
_WHOSE: Mapping[LabelSource, str] = {"gold": "gold", "teacher": "teacher's", "gold_else_teacher": "gold or teacher's"}


@dataclass(frozen=True, slots=True)
class Row:
    """``example`` is the example's place in the split; ``label_ids`` end with the end-of-sequence token.

    ``agreement`` is that of the teacher's votes on the example; 1 where it had none. ``prefix_ids`` are what the
    decoder reads before it writes ``label_ids``; no term looks at them.
    """

    example: int
    target: Target
    input_ids: Sequence[int]
    label_ids: Sequence[int]
    agreement: float = 1.0
    prefix_ids: Sequence[int] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids) + self.num_target_tokens

    @property
    def num_target_tokens(self) -> int:
        return len(self.prefix_ids) + len(self.label_ids)

    @property
    def key(self) -> int:
        """63 bits of all that a model beside the student may see of the row; equal rows have equal keys."""
        parts = (self.input_ids, self.prefix_ids, self.label_ids)
        content = array("q", [*map(len, parts), *(token for ids in parts for token in ids)]).tobytes()
        digest = hashlib.blake2b(self.target.encode() + content, digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, slots=True)
class RowSet:
    """The rows of a training split, in example order, with what was cut."""

    rows: tuple[Row, ...]
    inputs_cut: int
    targets_cut: int

    def count(self) -> dict[Target, int]:
        return dict(Counter(row.target for row in self.rows))


def target_texts(
    example: Example, answer: TeacherAnswer | None, target: Target, *, task: Task, label_from: LabelSource
) -> list[str]:
    """What the student should write for ``target``: one text a label, one a kept rationale, none where unknown."""
    voted = answer.label if answer is not None else None
    gold_first = label_from == "gold_else_teacher" and example.label is not None
    label = example.label if label_from == "gold" or gold_first else voted
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
) -> RowSet:
    """Raises DataError where a target that the objective wants has no row at all."""
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
        inputs, cut = view.inputs([examples[index].input for index in owners], target)
        inputs_cut += cut
        labels, cut = view.targets(texts)
        targets_cut += cut
        prefix = tuple(view.decoder_prefix(target))
        agreed = [answers[id].agreement if (id := examples[index].id) in answers else 1.0 for index in owners]
        parts = zip(owners, inputs, labels, agreed, strict=True)
        found += [Row(i, target, ids, label, agreement, prefix) for i, ids, label, agreement in parts]
    found.sort(key=lambda row: row.example)
    return RowSet(tuple(found), inputs_cut, targets_cut)


def _nothing_to_learn(target: Target, label_from: LabelSource, num_examples: int) -> str:
    if target == "label":
        what = f"a {_WHOSE[label_from]} label"
        do = "Set label_from: teacher (with a `rationales` section) for unlabelled data, or gold for labelled data."
    else:
        what = "a kept rationale" + ("" if target == "rationale" else f" and a {_WHOSE[label_from]} label")
        do = "Add a `rationales` section, loosen its `keep` rules, or remove the objective's terms on this target."
    return f"objective: the target '{target}' has no row: none of the {num_examples} training examples has {what}. {do}"
