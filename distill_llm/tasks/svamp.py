"""SVAMP: short arithmetic stories whose label is the equation, compared by its value."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill_llm.core.answers import AnswerKind, equation_tokens, equation_value
from distill_llm.core.example import Example
from distill_llm.tasks.base import SplitName, Task
from distill_llm.tasks.source import Layout, Row, read_splits
from distill_llm.tasks.wording import STATED_ANSWER, THEREFORE, few_shot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LAYOUT = Layout(
    stems={"train": ("svamp_train", "train"), "validation": ("svamp_valid",), "test": ("svamp_test", "test")}
)
_OPERATORS = frozenset("+-*/()")
_IN_PARENTHESES = THEREFORE + r"[Tt]he answer is\s*:?\s*(\(.*\)|[^(\s][^(\n]*)"


class Svamp(Task):
    """Arithmetic stories, Patel et al. 2021, arXiv:2103.07191.

    Local folder: the 800 / 200 rows of Hsieh et al. 2023 (arXiv:2305.02301). The Hub's ``ChilleD/SVAMP`` splits the
    same 1,000 rows 700 / 300, so its numbers are not those of the paper. ``reading`` decides what counts of "The
    answer is (16 * 17) * 4.": as in the code of that paper, the part in parentheses (its PaLM rationales: 73.25% of
    train and 74.00% of test right); lenient, the whole expression (74.25% and 77.50%).
    """

    kind: Literal["svamp"] = "svamp"
    title: ClassVar[str] = "SVAMP: arithmetic stories, the equation is the answer"
    licence: ClassVar[str] = "MIT"
    answer: ClassVar[AnswerKind] = "equation"

    data: str = Field(default="ChilleD/SVAMP", min_length=1, description="Hub id, or a folder with svamp_train.json")
    reading: Literal["published", "lenient"] = Field(
        default="published", description="lenient: read on after the closing parenthesis"
    )

    def read(self) -> Mapping[SplitName, Sequence[Example]]:
        found = read_splits(self.data, _LAYOUT)
        return {split: [_example(row, split) for row in rows] for split, rows in found.items()}

    def answer_sentence(self, label: str, example: Example) -> str:
        """``The answer is (84 / 2).``: the data's ``( 84.0 / 2.0 )`` as a person writes it."""
        short = re.sub(r"\.0+(?!\d)", "", label)
        short = re.sub(r"\(\s+", "(", re.sub(r"\s+\)", ")", short)).strip()
        return f"The answer is {short if _enclosed(short) else f'({short})'}."

    def answer_pattern(self) -> str:
        return _IN_PARENTHESES if self.reading == "published" else STATED_ANSWER

    def normalise(self, text: str, example: Example) -> str | None:
        """The equation in the data's spelling, ``( 84.0 / 2.0 )``; None for what has no value."""
        if equation_value(text) is None:
            return None
        tokens = [str(float(one)) if one not in _OPERATORS else one for one in equation_tokens(text)]
        while len(tokens) == 3 and tokens[0] == "(":
            tokens = tokens[1:2]
        spelled = " ".join(tokens)
        return spelled if len(tokens) == 1 or _enclosed(spelled) else f"( {spelled} )"


def _example(row: Row, split: SplitName) -> Example:
    if "Body" in row:
        story, label = f"{row.text('Body').strip()}\n{row.text('Question').strip()}", row.optional("Equation")
    else:
        story, label = row.text("input"), row.optional("label")
    return Example(
        id=row.optional("ID") or f"{split}-{row.number}",
        input=story,
        prompt=few_shot(" ".join(story.split())),
        label=label,
    )


def _enclosed(equation: str) -> bool:
    """Whether one pair of parentheses is around all of it."""
    depth = 0
    for place, sign in enumerate(equation):
        depth += (sign == "(") - (sign == ")")
        if depth == 0:
            return sign == ")" and place == len(equation) - 1
    return False
