"""GSM8K: school arithmetic in several steps, with human solutions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill_llm.core.answers import AnswerKind, number_text, parse_number
from distill_llm.core.errors import DataError
from distill_llm.core.example import Example
from distill_llm.tasks.base import SplitName, Task
from distill_llm.tasks.source import Layout, Row, read_splits
from distill_llm.tasks.wording import SHORT_ANSWER, few_shot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LAYOUT = Layout(
    stems={"train": ("train", "gsm8k_train"), "validation": ("valid", "gsm8k_valid"), "test": ("test", "gsm8k_test")},
    hub_config="main",
)
_CALCULATION = re.compile(r"<<[^<>]*>>")


class Gsm8k(Task):
    """Word problems of 2 to 8 steps, Cobbe et al. 2021, arXiv:2110.14168; 7,473 / 1,319 rows.

    The rationale is the human solution without its ``<<48/2=24>>`` calculator annotations; the label is the number
    after ``####``, without commas.
    """

    kind: Literal["gsm8k"] = "gsm8k"
    title: ClassVar[str] = "GSM8K: school arithmetic in several steps"
    licence: ClassVar[str] = "MIT"
    answer: ClassVar[AnswerKind] = "number"

    data: str = Field(default="openai/gsm8k", min_length=1, description="Hub id, or a folder with train.jsonl")

    def read(self) -> Mapping[SplitName, Sequence[Example]]:
        found = read_splits(self.data, _LAYOUT)
        return {split: [_example(row, split) for row in rows] for split, rows in found.items()}

    def answer_pattern(self) -> str:
        return SHORT_ANSWER

    def normalise(self, text: str, example: Example) -> str | None:
        value = parse_number(text)
        return None if value is None else number_text(value)


def _example(row: Row, split: SplitName) -> Example:
    question, label, rationale = row.text("question"), None, None
    solution = row.optional("answer")
    if solution is not None:
        steps, mark, stated = solution.rpartition("####")
        value = parse_number(stated)
        if not mark or value is None:
            raise DataError(
                f"{row.where}, row {row.number}: the field 'answer' ends in {solution[-60:]!r}. Expected steps, then "
                "'#### ' and a number: correct the row."
            )
        label, rationale = number_text(value), _CALCULATION.sub("", steps).strip() or None
    return Example(
        id=f"{split}-{row.number}", input=question, prompt=few_shot(question), label=label, rationale=rationale
    )
