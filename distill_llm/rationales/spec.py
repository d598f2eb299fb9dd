"""The recipe's rationale stage: who writes, what is asked, how often, for how much, and what is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from pydantic import Field, model_validator

from distill_llm.core.component import Component, any_of
from distill_llm.core.files import fingerprint
from distill_llm.core.prices import Prices
from distill_llm.rationales.keep import Keep, Parsable
from distill_llm.rationales.ledger import Budget
from distill_llm.rationales.prompts import HintSpec
from distill_llm.rationales.voices import Voice, refuse_samples_that_are_alike, voices_of
from distill_llm.teachers.base import Sampling, TextTeacherSpec
from distill_llm.teachers.prompt import PromptSpec
from distill_llm.teachers.several import Several

if TYPE_CHECKING:
    AnyTextTeacher: TypeAlias = TextTeacherSpec
    AnyKeep: TypeAlias = Keep
else:
    AnyTextTeacher = any_of(TextTeacherSpec, "distill_llm.teachers")
    AnyKeep = any_of(Keep, "distill_llm.rationales")

MANNER = ("budget", "prices", "allow_missing")
"""Fields that say how far the teacher is asked, not what it writes."""


class RationaleSpec(Component):
    teacher: AnyTextTeacher
    prompt: PromptSpec = PromptSpec()
    sampling: Sampling = Sampling()
    samples: int = Field(default=1, ge=1, description="completions an example; the majority label is the teacher's")
    hint_retry: HintSpec | None = Field(
        default=None, description="ask once more, with the gold label in the prompt, where every vote was wrong"
    )
    keep: tuple[AnyKeep, ...] = Field(
        default=(Parsable(),), description="rules, in order, that a rationale must all pass; []: any text is kept"
    )
    prices: Prices = Prices()
    budget: Budget = Budget()
    allow_missing: float = Field(
        default=0.0, ge=0, le=1, description="go on although this share of the requests came to nothing"
    )

    @model_validator(mode="after")
    def _samples_differ(self) -> RationaleSpec:
        refuse_samples_that_are_alike(self.voices, self.hint_retry.samples if self.hint_retry is not None else 0)
        return self

    @model_validator(mode="after")
    def _cost_has_prices(self) -> RationaleSpec:
        if self.budget.max_cost and not any(voice.prices.known for voice in self.voices):
            raise ValueError(
                "budget.max_cost needs `prices` (input_per_million and output_per_million): nobody else knows them"
            )
        currencies = sorted({voice.prices.currency for voice in self.voices if voice.prices.known})
        if len(currencies) > 1:
            raise ValueError(f"prices of teachers are in {currencies}, which cannot be added up. Give them in one")
        return self

    @property
    def voices(self) -> tuple[Voice, ...]:
        """Who is asked."""
        return voices_of(self)

    @property
    def knows_answers(self) -> bool:
        """Nobody is asked who would not repeat gold labels."""
        return all(voice.teacher.knows_answers for voice in self.voices)

    @property
    def keeps_logprobs(self) -> bool:
        return any(voice.sampling.top_logprobs > 0 for voice in self.voices)

    @property
    def weighs_by_accuracy(self) -> bool:
        return isinstance(self.teacher, Several) and self.teacher.weigh_by == "accuracy"

    @property
    def drops_failing(self) -> bool:
        return isinstance(self.teacher, Several) and self.teacher.drop_failing

    @property
    def manner(self) -> tuple[str, ...]:
        """Keys of the recipe that say how a teacher is asked, not what it writes."""
        own = (f"{voice.where}.{name}" for voice in self.voices for name in sorted(voice.teacher.manner))
        prices = (f"rationales.teacher.of.{name}.prices" for name in self.teacher.members())
        return (*(f"rationales.{name}" for name in MANNER), *own, *prices)

    @property
    def fingerprint(self) -> str:
        """Changes with all that decides the data set, and with nothing that only says how the teacher is asked."""
        return fingerprint([self.teacher.content(), self.model_dump(mode="json", exclude={"teacher", *MANNER})])
