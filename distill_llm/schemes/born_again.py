"""Generations of one student: each learns from the one before it, and starts from weights of its own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.objective import Term, targets_of
from distill_llm.schemes.base import Scheme
from distill_llm.schemes.stages import STUDENT, Sections, Stage, describe
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.frozen import Frozen

PREVIOUS = "previous"
"""What the terms of later generations call their teacher."""


class BornAgain(Scheme):
    """Furlanello et al. 2018 (arXiv:1805.04770): generation k teaches generation k + 1, of the same sizes.

    Generation 0 learns by the recipe's objective. A later one learns `terms` from the generation before, and the
    objective's hard labels unless `labels: false`; terms of the recipe's `teachers` are for generation 0 alone. The
    last generation is the student, and has the recipe's seed; each before it has a seed one higher.
    """

    kind: Literal["born_again"] = "born_again"
    generations: int = Field(default=2, ge=2, description="trainings in all, generation 0 and the student included")
    terms: tuple[Term, ...] = Field(
        default=(),
        description="what a later generation learns from the one before, which they call `teacher: previous`; empty: "
        "forward_kl on all targets of the objective",
    )
    labels: bool = Field(default=True, description="later generations keep the objective's terms without a teacher")

    @field_validator("terms")
    @classmethod
    def _of_the_previous(cls, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        wrong = [term.name for term in terms if term.teacher != PREVIOUS]
        if wrong:
            raise ValueError(f"{wrong} must have `teacher: {PREVIOUS}`, the generation before")
        return terms

    def stages(self, sections: Sections) -> tuple[Stage, ...]:
        last = self.generations - 1
        names = [f"generation_{number}" for number in range(last)] + [STUDENT]
        first = Stage(
            names[0],
            f"{describe(sections.objective)}; the first generation",
            sections.student,
            sections.teachers,
            sections.objective,
            StepByStep(),
            seed_shift=last,
        )
        hard = [term for term in sections.objective if term.teacher is None] if self.labels else []
        soft = self.terms or (_soft(sections.objective),)
        stages = [first]
        for number, name in enumerate(names[1:], start=1):
            before = names[number - 1]
            terms = (*hard, *(term.model_copy(update={"teacher": before}) for term in soft))
            if len({term.name for term in terms}) < len(terms):
                raise ValueError(
                    f"a term of `terms` has the name of another: {[term.name for term in terms]}. Rename it"
                )
            stages.append(
                Stage(
                    name,
                    f"{describe(terms)}; taught by {before}",
                    sections.student,
                    {**sections.teachers, before: Frozen(model=sections.model_of(before))},
                    terms,
                    StepByStep(),
                    after=(before,),
                    seed_shift=last - number,
                )
            )
        return tuple(stages)

    def alone(self) -> Scheme:
        """One generation."""
        return StepByStep()


def _soft(objective: tuple[Term, ...]) -> Term:
    return Term(name=PREVIOUS, loss=ForwardKL(), targets=targets_of(objective), teacher=PREVIOUS)
