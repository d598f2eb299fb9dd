"""The recipe's rationale stage: who writes, what is asked, how often, for how much, and what is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from pydantic import Field, model_validator

from distill_llm.core.component import Component, any_of
from distill_llm.core.files import fingerprint
from distill_llm.rationales.keep import Keep, Parsable
from distill_llm.rationales.ledger import Budget, Prices
from distill_llm.rationales.prompts import HintSpec, PromptSpec
from distill_llm.teachers.base import Sampling, TextTeacherSpec

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
        if self.samples > 1 and self.sampling.temperature == 0 and self.teacher.computes:
            raise ValueError(
                f"samples: {self.samples} with sampling.temperature: 0 would be {self.samples} times the same greedy "
                "text. Set a temperature (0.7 is usual for voting), or samples: 1"
            )
        hints = self.hint_retry
        if hints is not None and hints.samples > 1 and self.sampling.temperature == 0 and self.teacher.computes:
            raise ValueError("hint_retry.samples above 1 needs a sampling.temperature above 0")
        return self

    @model_validator(mode="after")
    def _cost_has_prices(self) -> RationaleSpec:
        if self.budget.max_cost and not self.prices.known:
            raise ValueError(
                "budget.max_cost needs `prices` (input_per_million and output_per_million): nobody else knows them"
            )
        return self

    @property
    def fingerprint(self) -> str:
        """Changes with all that decides the data set, and with nothing that only says how the teacher is asked."""
        teacher = self.teacher.model_dump(mode="json", exclude=set(self.teacher.manner))
        return fingerprint([teacher, self.model_dump(mode="json", exclude={"teacher", *MANNER})])
