"""The recipe: one YAML file for a whole run, validated before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pydantic import Field, field_validator, model_validator

from distill_llm.core.component import Component, any_of
from distill_llm.data.rows import LabelSource
from distill_llm.models.spec import StudentSpec
from distill_llm.objective import Term
from distill_llm.rationales.spec import RationaleSpec
from distill_llm.recipe.train import EvaluateSpec, TrainSpec
from distill_llm.schemes.base import Scheme
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.tasks.base import Task
from distill_llm.teachers.base import TensorTeacherSpec

if TYPE_CHECKING:
    AnyTask: TypeAlias = Task
    AnyScheme: TypeAlias = Scheme
    AnyTensorTeacher: TypeAlias = TensorTeacherSpec
else:
    AnyTask = any_of(Task, "distill_llm.tasks")
    AnyScheme = any_of(Scheme, "distill_llm.schemes")
    AnyTensorTeacher = any_of(TensorTeacherSpec, "distill_llm.teachers")


class Recipe(Component):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run")
    run_dir: str = Field(default="runs/{name}", min_length=1, description="the folder that the run fills")
    seed: int = Field(default=17, ge=0)
    task: AnyTask
    rationales: RationaleSpec | None = Field(default=None, description="absent: labels only, from the data")
    label_from: LabelSource = Field(
        default="gold", description="whose labels the student learns; gold_else_teacher: votes where the data has none"
    )
    student: StudentSpec
    teachers: dict[str, AnyTensorTeacher] = Field(default_factory=dict, description="teachers of soft labels, by name")
    scheme: AnyScheme = StepByStep()
    objective: tuple[Term, ...] = Field(min_length=1)
    train: TrainSpec
    evaluate: EvaluateSpec = EvaluateSpec()

    @property
    def folder(self) -> Path:
        return Path(self.run_dir.replace("{name}", self.name)).expanduser()

    @field_validator("objective")
    @classmethod
    def _names_differ(cls, objective: tuple[Term, ...]) -> tuple[Term, ...]:
        names = [term.name for term in objective]
        if len(set(names)) < len(names):
            raise ValueError(f"two terms have the same name: {names}")
        return objective

    @field_validator("teachers")
    @classmethod
    def _members_exist(cls, teachers: dict[str, TensorTeacherSpec]) -> dict[str, TensorTeacherSpec]:
        for name, teacher in teachers.items():
            unknown = [member for member in teacher.made_of() if member not in teachers]
            if unknown:
                others = sorted(set(teachers) - {name})
                raise ValueError(f"{name}: it is made of {unknown}, but the recipe's other teachers are {others}")
        for name in teachers:
            _refuse_circles(teachers, (name,))
        for name, teacher in teachers.items():
            try:
                teacher.check_others(teachers)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return teachers

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        asked = self.rationales
        for name, teacher in self.teachers.items():
            try:
                teacher.check_rationales(asked and asked.teacher, asked and asked.sampling)
            except ValueError as error:
                raise ValueError(f"teachers.{name}: {error}") from None
        for term in self.objective:
            if term.teacher is not None and term.teacher not in self.teachers:
                raise ValueError(
                    f"objective.{term.name}.teacher: '{term.teacher}' is not one of {sorted(self.teachers)}. "
                    "Add it under `teachers:`"
                )
            self._teacher_fits(term)
            if self.rationales is None and set(term.targets) != {"label"}:
                raise ValueError(
                    f"objective.{term.name}.targets: {list(term.targets)} need rationales, but the recipe has no "
                    "`rationales` section. Add one (kind gold takes the data's own), or keep to targets: [label]"
                )
        if self.label_from != "gold" and self.rationales is None:
            raise ValueError(f"label_from: {self.label_from} needs a `rationales` section: its teacher gives labels")
        if self.label_from == "teacher" and self.rationales is not None and self.rationales.hint_retry is not None:
            raise ValueError(
                "rationales.hint_retry explains gold labels, but label_from: teacher learns the votes, which were "
                "wrong there: label and rationale would contradict each other. Set label_from: gold, or "
                "gold_else_teacher"
            )
        self._pictures_are_read()
        if all(term.until < 1 for term in self.objective):
            raise ValueError("objective: every term ends (`until`) before the training does; let one go on to the end")
        self._ablations_exist()
        return self

    def _teacher_fits(self, term: Term) -> None:
        if term.teacher is None:
            return
        teacher = self.teachers[term.teacher]
        unknown = [target for target in term.targets if target not in teacher.knows]
        if unknown:
            raise ValueError(
                f"objective.{term.name}.targets: teacher '{term.teacher}' says nothing of {unknown}, but of "
                f"{sorted(teacher.knows)} only. Take these out, or name another teacher"
            )
        try:
            teacher.check_loss(term.loss)
        except ValueError as error:
            raise ValueError(f"objective.{term.name}.loss: {error}") from None

    def _pictures_are_read(self) -> None:
        """What students that see pictures cannot do, and what teachers that are made of the student cannot."""
        picture = self.student.picture
        for name, teacher in self.teachers.items():
            view = teacher.own_view()
            if view is None or not teacher.moves:
                continue
            if (view.picture is None) != (picture is None):
                reads, do = ("pictures", "add `picture` to") if picture else ("text", "remove `picture` from")
                raise ValueError(f"teachers.{name}.view: it is the student, which reads {reads}: {do} the view")
        if picture is None:
            return
        if self.train.packing == "always":
            raise ValueError(
                "train.packing: always: pictures are all of one size, and go through side by side. Set packing: auto"
            )
        for term in self.objective:
            if term.side == "encoder":
                raise ValueError(
                    f"objective.{term.name}.loss: it compares an encoder's states at the tokens of the input, and a "
                    "picture has none. Take `of: decoder` or a loss on logits"
                )

    def _ablations_exist(self) -> None:
        names = {term.name for term in self.objective}
        for ablation, kept in self.evaluate.ablations.items():
            unknown = set(kept) - names
            if unknown or not kept:
                raise ValueError(
                    f"evaluate.ablations.{ablation}: {sorted(unknown) or 'no terms'}; expected some of the objective's "
                    f"terms {sorted(names)}"
                )
            if all(term.until < 1 for term in self.objective if term.name in kept):
                raise ValueError(
                    f"evaluate.ablations.{ablation}: every term of {list(kept)} ends (`until`) before the training "
                    "does; add one that goes on to the end"
                )
            if ablation in ("student", "labels_same_steps", "labels_same_compute", "teacher"):
                raise ValueError(f"evaluate.ablations.{ablation}: this name is taken; choose another")


def _refuse_circles(teachers: Mapping[str, TensorTeacherSpec], way: tuple[str, ...]) -> None:
    """Follows what the last teacher of ``way`` is made of, and so on down."""
    for member in teachers[way[-1]].made_of():
        if member in way:
            circle = " > ".join([*way[way.index(member) :], member])
            raise ValueError(f"{member}: it is made of itself ({circle}). Take it out of one of them")
        _refuse_circles(teachers, (*way, member))
