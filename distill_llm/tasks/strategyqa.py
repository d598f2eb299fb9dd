"""StrategyQA: yes or no, where the steps to the answer are not in the question."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill_llm.core.errors import DataError
from distill_llm.core.example import Example
from distill_llm.tasks.base import SplitName, Task
from distill_llm.tasks.source import Layout, Row, read_splits
from distill_llm.tasks.wording import SHORT_ANSWER, few_shot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LAYOUT = Layout(
    stems={"train": ("train", "strategyqa_train"), "test": ("dev", "test", "strategyqa_test")},
)
_CHOICES = ("yes", "no")
_MEANING = {"yes": "yes", "true": "yes", "1": "yes", "no": "no", "false": "no", "0": "no"}


class StrategyQa(Task):
    """Yes/no questions of several hidden steps, Geva et al. 2021, arXiv:2101.02235; 2,061 / 229 rows.

    The public test set has no labels: ``dev.json`` is the test split here. The rationale is put together from the
    annotators' ``facts``. One question stands twice in the training data, hence ``overlap: drop`` as default: the
    copies may fall on both sides of the cut between train and validation.
    """

    kind: Literal["strategyqa"] = "strategyqa"
    title: ClassVar[str] = "StrategyQA: yes or no in hidden steps"
    licence: ClassVar[str] = "MIT"

    data: str = Field(
        default="ChilleD/StrategyQA", min_length=1, description="Hub id, or a folder with train.json and dev.json"
    )
    overlap: Literal["refuse", "drop"] = Field(
        default="drop", description="training inputs that are also in validation or test"
    )

    def read(self) -> Mapping[SplitName, Sequence[Example]]:
        found = read_splits(self.data, _LAYOUT)
        return {split: [_example(row, split) for row in rows] for split, rows in found.items()}

    def answer_pattern(self) -> str:
        return SHORT_ANSWER

    def normalise(self, text: str, example: Example) -> str | None:
        """The one of yes and no (true and false) that the text begins with."""
        first = re.match(r"\W*(yes|no|true|false)\b", text, re.IGNORECASE)
        return _MEANING[first[1].lower()] if first else None


def _example(row: Row, split: SplitName) -> Example:
    question, stated = row.text("question"), row.optional("answer")
    if stated is not None and stated.strip().lower() not in _MEANING:
        raise DataError(
            f"{row.where}, row {row.number}: the field 'answer' is {stated!r}. Expected true or false, yes or no."
        )
    return Example(
        id=row.optional("qid") or f"{split}-{row.number}",
        input=question,
        prompt=few_shot(question),
        label=None if stated is None else _MEANING[stated.strip().lower()],
        rationale=_rationale(row),
        choices=_CHOICES,
    )


def _rationale(row: Row) -> str | None:
    """The facts as sentences in one line; some copies of the data hold them as one text."""
    facts = row.get("facts")
    if not facts:
        return None
    sentences = [" ".join(fact.split()) for fact in ([facts] if isinstance(facts, str) else row.texts("facts"))]
    return " ".join(one if one.endswith((".", "!", "?")) else f"{one}." for one in sentences)
