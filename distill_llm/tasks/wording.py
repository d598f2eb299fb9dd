"""How questions and answer sentences are worded, the same in every task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_llm.core.answers import normalise_text
from distill_llm.tasks.base import lettered

if TYPE_CHECKING:
    from collections.abc import Sequence

# "So" belongs to the sentence, not to the rationale before it; "The answer is one of these four." states none; and
# the tempered dot makes the last "the answer is" of a line count.
THEREFORE = r"(?:\b(?:[Ss]o|[Tt]hus|[Hh]ence|[Tt]herefore),?\s+)?"
_START = rf"{THEREFORE}(?:[Tt]he answer is|####)\s*:?(?!\s*one of\b)\s*"
_UP_TO = r"((?:(?![Tt]he answer is).)+?)"
STATED_ANSWER = rf"{_START}{_UP_TO}\s*(?:\n|$)"
SHORT_ANSWER = rf"{_START}{_UP_TO}\s*(?:\n|[.!]\s|[.!]?$)"


def few_shot(question: str) -> str:
    """A question as a few-shot prompt ends: the teacher's text follows."""
    return f"Q: {question}\nA:"


def bare_question(prompt: str) -> str:
    """The question in a prompt that ``few_shot`` framed; any other prompt as it is."""
    framed = prompt.startswith("Q: ") and prompt.endswith("\nA:")
    return prompt[3:-3] if framed else prompt


def reworded(prompt: str, question: str) -> str:
    """Another question in the frame of ``prompt``."""
    return question if bare_question(prompt) == prompt else few_shot(question)


def with_choices(question: str, choices: Sequence[str]) -> str:
    """A question with its choices in lines ``(a) text``."""
    return f"{question}\nAnswer Choices:\n{lettered(choices)}"


def lettered_answer(label: str, choices: Sequence[str]) -> str:
    """``So the answer is (d) math problem.``; without a letter where ``label`` is not one of the choices."""
    places = [i for i, choice in enumerate(choices) if choice == label] or [
        i for i, choice in enumerate(choices) if normalise_text(choice) == normalise_text(label)
    ]
    letter = f"({chr(ord('a') + places[0])}) " if places else ""
    return f"So the answer is {letter}{label}."
