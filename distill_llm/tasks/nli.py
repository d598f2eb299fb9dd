"""What the two tasks of natural language inference share: does the hypothesis follow from the premise?"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill_llm.core.errors import DataError
from distill_llm.core.example import Example
from distill_llm.tasks.base import SplitName, Task
from distill_llm.tasks.source import Layout, Row, read_splits
from distill_llm.tasks.wording import SHORT_ANSWER, few_shot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_CHOICES = ("entailment", "neutral", "contradiction")  # in the order of the data sets' class numbers
_STATED = re.compile(r"\b(entail|neutral|contradict)", re.IGNORECASE)
_BY_STEM = {"entail": "entailment", "neutral": "neutral", "contradict": "contradiction"}


class Nli(Task):
    """Premise and hypothesis in readable words.

    Hsieh et al. 2023 (arXiv:2305.02301) put T5's end-of-sequence token between the two; we write "premise: ...
    hypothesis: ..." (as T5's own training on MNLI did, Raffel et al. 2020, arXiv:1910.10683), which reads the same
    for every tokenizer and for a teacher.
    """

    data: str = Field(min_length=1, description="Hub id, or a local folder")
    overlap: Literal["refuse", "drop"] = Field(
        default="drop", description="training inputs that are also in validation or test"
    )

    def answer_pattern(self) -> str:
        return SHORT_ANSWER

    def normalise(self, text: str, example: Example) -> str | None:
        """The one label that is named, also as a verb ("contradicts"); None for none and for several."""
        named = {_BY_STEM[stem.lower()] for stem in _STATED.findall(text)}
        return named.pop() if len(named) == 1 else None

    def _read(self, layout: Layout, rationale_field: str) -> Mapping[SplitName, Sequence[Example]]:
        found = read_splits(self.data, layout)
        return {split: [_example(row, split, rationale_field) for row in rows] for split, rows in found.items()}


def _example(row: Row, split: SplitName, rationale_field: str) -> Example:
    question = f"premise: {row.text('premise').strip()} hypothesis: {row.text('hypothesis').strip()}"
    return Example(
        id=f"{split}-{row.number}",
        input=question,
        prompt=few_shot(question),
        label=_label(row),
        rationale=row.optional(rationale_field),
        choices=_CHOICES,
    )


def _label(row: Row) -> str | None:
    """Name or class number; -1 and "-" are how these data sets say that the annotators did not agree."""
    stated = (row.optional("label") or "-").strip().lower()
    if stated in ("-", "-1"):
        return None
    if stated in ("0", "1", "2"):
        return _CHOICES[int(stated)]
    if stated not in _CHOICES:
        raise DataError(
            f"{row.where}, row {row.number}: the field 'label' is {stated!r}. Expected one of {list(_CHOICES)}, or 0, "
            "1, 2 in this order."
        )
    return stated
