"""Who is asked: the recipe's teacher of text, or each of several, with all that is its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from distill_llm.core.prices import Prices
from distill_llm.teachers.base import Sampling, TeacherFacts, TextTeacherSpec
from distill_llm.teachers.prompt import PromptSpec
from distill_llm.teachers.several import Several

if TYPE_CHECKING:
    from distill_llm.rationales.spec import RationaleSpec


@dataclass(frozen=True, slots=True)
class Voice:
    """``name`` is empty for a teacher alone. ``where`` and ``prompt_where`` are its keys in the recipe."""

    name: str
    teacher: TextTeacherSpec
    prompt: PromptSpec
    sampling: Sampling
    samples: int
    weight: float
    prices: Prices
    where: str = "rationales.teacher"
    prompt_where: str = "rationales.prompt"
    described: Callable[[], TeacherFacts] | None = None

    @property
    def votes(self) -> bool:
        """One that repeats gold labels has no vote: counting it would make the others seem right."""
        return not self.teacher.knows_answers

    def describe(self) -> TeacherFacts:
        return self.described() if self.described is not None else self.teacher.describe()


def voices_of(spec: RationaleSpec) -> tuple[Voice, ...]:
    """In the order of the recipe; what a member has not of its own is the section's."""
    if not isinstance(spec.teacher, Several):
        return (Voice("", spec.teacher, spec.prompt, spec.sampling, spec.samples, 1.0, spec.prices),)
    found = []
    for name, member in spec.teacher.of.items():
        where = f"rationales.teacher.of.{name}"
        found.append(
            Voice(
                name,
                member.teacher,
                member.prompt or spec.prompt,
                member.sampling or spec.sampling,
                member.samples or spec.samples,
                member.weight,
                member.prices or spec.prices,
                f"{where}.teacher",
                f"{where}.prompt" if member.prompt else "rationales.prompt",
                partial(spec.teacher.facts_of, name),
            )
        )
    return tuple(found)


def refuse_samples_that_are_alike(voices: Sequence[Voice], hint_samples: int) -> None:
    """Raises ValueError where some voice would write the same text again and again, or two are the same."""
    for voice in voices:
        greedy = voice.sampling.temperature == 0 and voice.teacher.computes
        who = f"teacher.of.{voice.name}: " if voice.name else ""
        if voice.samples > 1 and greedy:
            raise ValueError(
                f"{who}samples: {voice.samples} with sampling.temperature: 0 would be {voice.samples} times the same "
                "greedy text. Set a temperature (0.7 is usual for voting), or samples: 1"
            )
        if hint_samples > 1 and greedy:
            raise ValueError(f"{who}hint_retry.samples above 1 needs a sampling.temperature above 0")
    seen: dict[str, str] = {}
    for voice in voices:
        asked = [voice.teacher.content(), voice.prompt.model_dump(mode="json"), voice.sampling.model_dump(mode="json")]
        same = seen.setdefault(repr(asked), voice.name)
        if same != voice.name:
            raise ValueError(
                f"teacher.of: {same} and {voice.name} are the same teacher, asked the same, and would write the same. "
                "Name it once with more `samples` and `weight`, or give one another prompt or sampling"
            )
