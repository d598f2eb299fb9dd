"""What a task gives: examples, in three splits that share nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Target = Literal["label", "rationale", "rationale_then_label"]
TARGETS: tuple[Target, ...] = ("label", "rationale", "rationale_then_label")


@dataclass(frozen=True, slots=True)
class Example:
    """One input with what is known of it.

    ``input`` is what the student reads; ``prompt`` is the same question as a teacher sees it in a few-shot prompt.
    ``label`` and ``rationale`` are gold (None where the data has none). ``origin`` and ``row`` are the split and the
    place in it that the source gave, before anything was cut off or limited: replayed completions are found by them.
    ``picture`` is the path of an image file or its content, empty where the data has none.
    """

    id: str
    input: str
    prompt: str
    label: str | None = None
    rationale: str | None = None
    choices: tuple[str, ...] = ()
    origin: str = ""
    row: int = -1
    picture: str | bytes = ""


@dataclass(frozen=True, slots=True)
class Splits:
    """Examples to learn from, to choose settings with, and to report on once.

    ``dropped`` counts those left out because another split has the same input.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class TeacherAnswer:
    """What a teacher's completions for one example came to: the voted label and the rationales that were kept."""

    label: str | None
    rationales: tuple[str, ...]
    agreement: float
