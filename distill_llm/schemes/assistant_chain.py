"""A chain of models, each smaller than the one above: teacher > assistants > student, each taught by those above it."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from distill_llm.core.component import Component
from distill_llm.core.errors import ConfigError
from distill_llm.core.schedule import Schedule
from distill_llm.models.spec import HubConfig, StudentSpec
from distill_llm.objective import Objective, Term
from distill_llm.schemes.base import Scheme
from distill_llm.schemes.stages import STUDENT, Sections, Stage, describe
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.base import TensorTeacherSpec
from distill_llm.teachers.ensemble import Ensemble
from distill_llm.teachers.frozen import Frozen

ABOVE = "models_above"
"""The pseudo-teacher: the mean of all models above."""


class Assistant(Component):
    """A model between teacher and student: other sizes of the student, or a pretrained `model` with its tokenizer."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", description="of its stage, and as a teacher")
    config: HubConfig = Field(default_factory=dict, description="sizes that differ from `student.config`")
    model: str = Field(default="", description="Hub id or folder, in place of `config`")
    revision: str = "main"

    @model_validator(mode="after")
    def _one_source(self) -> Assistant:
        if bool(self.config) == bool(self.model):
            raise ValueError(
                f"assistant '{self.name}': give either `config` (sizes that differ from the student's) or `model` (a "
                "Hub id or folder), not both or neither"
            )
        return self

    def spec(self, student: StudentSpec) -> StudentSpec:
        """The assistant as a student; what is not its own is the student's."""
        if self.model:
            return student.whole(model=self.model, revision=self.revision, config={})
        config = {**student.config, **self.config}
        if "model_type" not in config:
            raise ValueError(
                f"assistant '{self.name}': the student is a pretrained `model`, so that `config` has to be whole, with "
                "a model_type; or give `model`"
            )
        return student.whole(model="", config=config, lora=None, tokenizer=student.tokenizer or student.model)


class AssistantChain(Scheme):
    """Mirzadeh et al. 2020 (arXiv:1902.03393): each stage is taught by the model just above it (`guidance: nearest`).

    `dense`: by all models above it (Son et al. 2021, arXiv:2009.08825); a term of the teacher becomes one for each of
    them, which share its weight. Their loss sums (1 - w) CE + w KD over the n models above; ours is that over n, so
    that the weights of a recipe mean the same in every stage. `drop`: each model above is left out of a step with
    this probability, never all; those that are kept share the weight, as the sum above would over these alone.
    `ensemble`: by the mean of all models above, as one pseudo-teacher.
    """

    kind: Literal["assistant_chain"] = "assistant_chain"
    teacher: str = Field(min_length=1, description="one of `teachers`: the top of the chain")
    guidance: Literal["nearest", "dense", "ensemble"] = Field(
        default="nearest", description="who teaches a stage: the model just above, all above, or the mean of all above"
    )
    assistants: tuple[Assistant, ...] = Field(default=(), description="from the largest to the smallest")
    derived: int = Field(
        default=0, ge=0, description="so many assistants between the configs of teacher and student, in equal ratios"
    )
    drop: float = Field(
        default=0.0, ge=0, lt=1, description="with `dense`: probability that a model above is left out of a step"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> AssistantChain:
        if self.assistants and self.derived:
            raise ValueError("give either `assistants` or `derived`, not both")
        if self.drop and self.guidance != "dense":
            raise ValueError(
                f"`drop` leaves out some of several teachers; guidance: {self.guidance} has one. Remove it"
            )
        return self

    def resolved(self, sections: Sections) -> Scheme:
        if not self.derived:
            return self
        from distill_llm.models.load import read_config
        from distill_llm.models.sizes import sizes_between

        top, student = sections.teachers[self.teacher], sections.student
        assert isinstance(top, Frozen), "the recipe was checked"
        theirs = read_config(top.model, top.revision, where=f"teachers.{self.teacher}.model")
        try:
            found = sizes_between(theirs, student.config, self.derived)
        except ValueError as error:
            raise ConfigError(f"scheme.derived: {error}. Give `assistants` instead.") from None
        assistants = tuple(Assistant(name=name, config=config) for name, config in zip(self._names, found, strict=True))
        return self.model_copy(update={"derived": 0, "assistants": assistants})

    def stages(self, sections: Sections) -> tuple[Stage, ...]:
        self._check(sections)
        specs = [one.spec(sections.student) for one in self.assistants] or [sections.student] * self.derived
        chain = [*zip(self._names, specs, strict=True), (STUDENT, sections.student)]
        stages = []
        for number, (name, spec) in enumerate(chain):
            above = [self.teacher, *(one for one, _ in chain[:number])]
            models = {one: Frozen(model=sections.model_of(one)) for one in above[1:]}
            teachers, terms = self._taught_by(above, {**sections.teachers, **models}, sections.objective)
            asked = [one for one in (*above, ABOVE) if any(term.teacher == one for term in terms)]
            stages.append(
                Stage(
                    name,
                    f"{describe(sections.objective)}; taught by {', '.join(self._said(asked, above))}",
                    spec,
                    teachers,
                    terms,
                    scheme=self._scheme_below(above),
                    after=tuple(one for one in above[1:] if one in asked or ABOVE in asked),
                )
            )
        return tuple(stages)

    def alone(self) -> Scheme:
        """Direct distillation."""
        return StepByStep()

    def at_step(self, objective: Objective, step: int, seed: int) -> Objective:
        """Without the terms of the teachers that are dropped, by seed and step alone: the same in all processes."""
        chain = {self.teacher, *self._names}
        present = sorted({term.teacher for term in objective.terms if term.teacher in chain})
        if not self.drop or len(present) < 2:
            return objective
        draw = random.Random(f"{seed} {step} drop")
        kept: list[str] = []
        while not kept:
            kept = [name for name in present if draw.random() >= self.drop]
        share = len(present) / len(kept)
        terms = []
        for term in objective.terms:
            if term.teacher not in chain:
                terms.append(term)
            elif term.teacher in kept:
                terms.append(_weighing(term, share))
        return Objective(terms)

    @property
    def _names(self) -> list[str]:
        return [one.name for one in self.assistants] or [f"assistant_{number + 1}" for number in range(self.derived)]

    def _check(self, sections: Sections) -> None:
        if self.teacher not in sections.teachers:
            raise ValueError(f"teacher '{self.teacher}' is not one of {sorted(sections.teachers)}. Add it")
        if all(term.teacher != self.teacher for term in sections.objective):
            raise ValueError(
                f"no term of the objective has `teacher: {self.teacher}`: there is nothing to hand down the chain"
            )
        top = sections.teachers[self.teacher]
        if top.moves:
            raise ValueError(
                f"teacher '{self.teacher}' follows the student that it teaches. Name one that stands still"
            )
        if self.derived and not (isinstance(top, Frozen) and sections.student.config):
            raise ValueError(
                "`derived` needs a teacher of `kind: frozen` and a student with a `config`, between which sizes can "
                "be found. Give `assistants`"
            )
        if self.guidance == "ensemble" and ABOVE in sections.teachers:
            raise ValueError(f"a teacher is called '{ABOVE}', as the mean of all models above is. Rename it")

    def _scheme_below(self, above: Sequence[str]) -> Scheme:
        """What acts within one training: the dropping of teachers, where there are several."""
        if not self.drop or len(above) < 2:
            return StepByStep()
        return self.model_copy(update={"assistants": self.assistants[: len(above) - 1]})

    def _taught_by(
        self, above: Sequence[str], teachers: Mapping[str, TensorTeacherSpec], terms: Sequence[Term]
    ) -> tuple[dict[str, TensorTeacherSpec], tuple[Term, ...]]:
        """The teachers and the terms of a stage below ``above``; one model above is itself in every guidance."""
        asked = {"nearest": [above[-1]], "dense": list(above), "ensemble": [ABOVE]}[self.guidance]
        if len(above) == 1:
            asked = list(above)
        found = dict(teachers)
        if ABOVE in asked:
            found[ABOVE] = Ensemble(of=tuple(above))
        handed: list[Term] = []
        for term in terms:
            handed += _for_each(term, asked) if term.teacher == self.teacher else [term]
        names = [term.name for term in handed]
        if len(set(names)) < len(names):
            raise ValueError(f"terms of `dense` guidance have the names of others: {sorted(names)}. Rename a term")
        return found, tuple(handed)

    def _said(self, asked: Sequence[str], above: Sequence[str]) -> list[str]:
        mean = f"the mean of {', '.join(above)}"
        return [mean if name == ABOVE else name for name in asked]


def _for_each(term: Term, teachers: Sequence[str]) -> list[Term]:
    """The term, once for each teacher: they share its weight."""
    if len(teachers) == 1:
        return [term.model_copy(update={"teacher": teachers[0]})]
    copies = []
    for teacher in teachers:
        own: dict[str, Any] = {"name": f"{term.name}_{re.sub(r'[^A-Za-z0-9_]', '_', teacher)}", "teacher": teacher}
        copies.append(_weighing(term, 1 / len(teachers)).model_copy(update=own))
    return copies


def _weighing(term: Term, share: float) -> Term:
    weight = term.weight
    if isinstance(weight, Schedule):
        ends = {"start": weight.start * share, "end": weight.end * share}
        return term.model_copy(update={"weight": weight.model_copy(update=ends)})
    return term.model_copy(update={"weight": weight * share})
