"""Pruning with recovery: a model is cut a step, learns from the teachers, is cut the next step, and so on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from distill_llm.models.cut_spec import Cut
from distill_llm.models.spec import StudentSpec
from distill_llm.schemes.base import Scheme
from distill_llm.schemes.stages import STUDENT, Sections, Stage, begun_by, describe
from distill_llm.schemes.step_by_step import StepByStep


class Prune(Scheme):
    """Minitron (Muralidharan et al. 2024, arXiv:2407.14679, sec. 2 and 3): importance, cut, distillation, and again.

    `student.model` comes down to `student.cut` in `cuts` steps. Each stage measures the model that the one before left,
    cuts it, and trains what is left with the recipe's objective; all stages share the recipe's steps.
    """

    kind: Literal["prune"] = "prune"
    cuts: int = Field(default=2, ge=1, le=16, description="steps to the student's sizes, each with a training")
    spacing: Literal["geometric", "linear"] = Field(
        default="geometric", description="each size goes down in equal ratios, or by equal numbers"
    )
    recovery_share: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="of the recipe's steps, for the stages before the last, in equal parts; the student has the rest",
    )
    steps: tuple[Cut, ...] = Field(
        default=(), description="sizes after each cut, of what the one before left; empty: derived from configs"
    )

    @model_validator(mode="after")
    def _as_many_steps(self) -> Prune:
        if self.steps and len(self.steps) != self.cuts:
            raise ValueError(f"`steps` names {len(self.steps)} cuts, and `cuts` is {self.cuts}: leave one of them out")
        return self

    def resolved(self, sections: Sections) -> Scheme:
        if self.steps:
            return self
        from distill_llm.models.cut_steps import steps_to
        from distill_llm.models.load import read_config

        student = sections.student
        assert student.cut is not None, "the recipe was checked"
        config = read_config(student.model, student.revision, where="student.model")
        steps = steps_to(config, student.cut, self.cuts, self.spacing, "student.cut")
        return self.model_copy(update={"steps": tuple(steps)})

    def stages(self, sections: Sections) -> tuple[Stage, ...]:
        cut = _checked(sections)
        names = [f"cut_{number}" for number in range(1, self.cuts)] + [STUDENT]
        stages = []
        for number, name in enumerate(names):
            before = names[number - 1] if number else ""
            student = sections.student if not before else begun_by(sections.student, sections.model_of(before))
            step = self.steps[number] if self.steps else cut
            share = 1.0 if self.cuts == 1 else self.recovery_share / (self.cuts - 1)
            stages.append(
                Stage(
                    name,
                    f"{describe(sections.objective)}; cut {number + 1} of {self.cuts}",
                    student.model_copy(update={"cut": step}),
                    sections.teachers,
                    sections.objective,
                    StepByStep(),
                    after=(before,) if before else (),
                    share_of_steps=1 - self.recovery_share if before and name == STUDENT else share,
                )
            )
        return tuple(stages)

    def alone(self) -> Scheme:
        """One cut, and all steps behind it."""
        return StepByStep()

    def check(self, recipe: Any) -> None:
        from distill_llm.models.cut_steps import check_steps
        from distill_llm.models.load import read_config

        student: StudentSpec = recipe.student
        assert student.cut is not None, "the recipe was checked"
        if self.steps:
            config = read_config(student.model, student.revision, where="student.model")
            check_steps(config, student.cut, self.steps, "scheme.steps")


def _checked(sections: Sections) -> Cut:
    student = sections.student
    if student.cut is None or student.fresh:
        raise ValueError(
            "prune needs a `student.model` with a `student.cut` (and not `fresh`): what it comes down to, such as "
            "cut: {ratio: 0.5}"
        )
    if student.cut.lists:
        raise ValueError(
            "student.cut.layers names layers one by one, and the later cuts are of models that have others. Give a "
            "number"
        )
    return student.cut
