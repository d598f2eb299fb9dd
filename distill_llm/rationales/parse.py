"""From a teacher's raw text to a rationale and a label."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill_llm.core.example import Example
    from distill_llm.tasks.base import Task

_NEXT_QUESTION = re.compile(r"\n\s*Q:|\n\s*Question:")


@dataclass(frozen=True, slots=True)
class Parsed:
    """``label`` is None where the text states none; ``problem`` then says why."""

    rationale: str
    label: str | None
    problem: str = ""


def cut_run_on(text: str) -> str:
    """The text up to the next question that a base model invents."""
    return _NEXT_QUESTION.split(text, maxsplit=1)[0].strip()


def parse(text: str, task: Task, example: Example) -> Parsed:
    """The rationale is what stands before the sentence with the answer; the last such sentence counts."""
    text = cut_run_on(text)
    if not text:
        return Parsed("", None, "empty")
    found = list(re.finditer(task.answer_pattern(), text))
    if not found:
        return Parsed(text, None, "no answer sentence")
    rationale = text[: found[-1].start()].strip()
    label = task.normalise(found[-1][1], example)
    if label is None:
        return Parsed(rationale, None, "answer is not a label")
    return Parsed(rationale, label, "" if rationale else "no rationale")
