"""CommonsenseQA with the human explanations of CoS-E: five choices, one is right."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill_llm.core.example import Example
from distill_llm.tasks.base import SplitName, Task, chosen
from distill_llm.tasks.source import Layout, Row, read_splits
from distill_llm.tasks.wording import STATED_ANSWER, few_shot, lettered_answer, with_choices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LAYOUT = Layout(
    stems={"train": ("cqa_train", "train"), "validation": ("cqa_valid",), "test": ("cqa_test", "test")},
    hub={"train": "train", "test": "validation"},
    hub_config="v1.11",
)


class Cqa(Task):
    """Multiple choice about everyday life, 9,741 / 1,221 rows.

    Questions: Talmor et al. 2019, arXiv:1811.00937; explanations: Rajani et al. 2019 (CoS-E v1.11), arXiv:1906.02361.
    The test set of Hsieh et al. 2023 (arXiv:2305.02301) is what the Hub calls ``validation``. ``reading`` decides
    what an answer in other letters is worth: as in the code of that paper, "(b) Istanbul." is not the choice
    "istanbul" (its PaLM rationales: 74.26% of train and 77.23% of test right); lenient, it is (75.29% and 78.21%).
    """

    kind: Literal["cqa"] = "cqa"
    title: ClassVar[str] = "CommonsenseQA: everyday multiple choice"
    licence: ClassVar[str] = "BSD-3-Clause (CoS-E), MIT (CommonsenseQA)"

    data: str = Field(default="Salesforce/cos_e", min_length=1, description="Hub id, or a folder with cqa_train.json")
    reading: Literal["published", "lenient"] = Field(
        default="published", description="lenient: capitals and quotes in an answer do not matter"
    )

    def read(self) -> Mapping[SplitName, Sequence[Example]]:
        found = read_splits(self.data, _LAYOUT)
        return {split: [_example(row) for row in rows] for split, rows in found.items()}

    def answer_sentence(self, label: str, example: Example) -> str:
        return lettered_answer(label, example.choices)

    def answer_pattern(self) -> str:
        return STATED_ANSWER

    def normalise(self, text: str, example: Example) -> str | None:
        return chosen(text, example.choices, match_case=self.reading == "published")


def _example(row: Row) -> Example:
    choices = row.texts("choices")
    question = with_choices(row.text("question"), choices)
    return Example(
        id=row.text("id"),
        input=question,
        prompt=few_shot(question),
        label=row.optional("answer"),
        rationale=row.optional("abstractive_explanation"),
        choices=choices,
    )
