"""The recipe's rationale stage: who writes, what is asked, how often, and what is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from pydantic import Field, model_validator

from distill_llm.core.component import Component, any_of
from distill_llm.rationales.keep import Keep
from distill_llm.rationales.prompts import PromptSpec
from distill_llm.teachers.base import Sampling, TextTeacherSpec

if TYPE_CHECKING:
    AnyTextTeacher: TypeAlias = TextTeacherSpec
    AnyKeep: TypeAlias = Keep
else:
    AnyTextTeacher = any_of(TextTeacherSpec, "distill_llm.teachers")
    AnyKeep = any_of(Keep, "distill_llm.rationales")


class RationaleSpec(Component):
    teacher: AnyTextTeacher
    prompt: PromptSpec = PromptSpec()
    sampling: Sampling = Sampling()
    samples: int = Field(default=1, ge=1, description="completions an example; the majority label is the teacher's")
    keep: tuple[AnyKeep, ...] = Field(default=(), description="rules that a rationale must all pass")

    @model_validator(mode="after")
    def _samples_differ(self) -> RationaleSpec:
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"samples: {self.samples} with sampling.temperature: 0 would be {self.samples} times the same greedy "
                "text. Set a temperature (0.7 is usual for voting), or samples: 1"
            )
        return self
