"""The recipe: one YAML file for a whole run, validated before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pydantic import Field, field_validator, model_validator

from distill_llm.core.component import Component, any_of
from distill_llm.data.rows import LabelSource
from distill_llm.models.spec import StudentSpec
from distill_llm.objective import Term
from distill_llm.rationales.spec import RationaleSpec
from distill_llm.recipe.train import EvaluateSpec, TrainSpec
from distill_llm.recipe.transfer import TransferSpec
from distill_llm.schemes.base import Scheme
from distill_llm.schemes.stages import TAKEN, Sections, Stage, check_stages, check_terms
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
    transfer: TransferSpec | None = Field(
        default=None, description="classes that the student never sees examples of; absent: it sees all"
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

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What the scheme makes of the recipe; the student's training is the last."""
        return self.scheme.stages(self._sections)

    def resolved(self) -> Recipe:
        """With all filled in that configs of models decide (``Scheme.resolved``)."""
        scheme = self.scheme.resolved(self._sections)
        return self if scheme == self.scheme else self.model_copy(update={"scheme": scheme})

    @property
    def _sections(self) -> Sections:
        return Sections(self.student, self.teachers, self.objective, lambda name: str(model_folder(self.folder, name)))

    @property
    def training_seed(self) -> int:
        return self.seed if self.train.seed == "recipe" else self.train.seed

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
            view = teacher.own_view()
            if view is not None and view.rationale and asked is None:
                raise ValueError(f"teachers.{name}.view.rationale: the recipe has no `rationales` section to tell from")
            try:
                teacher.check_rationales(asked and asked.teacher, asked and asked.sampling)
            except ValueError as error:
                raise ValueError(f"teachers.{name}: {error}") from None
        check_terms(self.objective, self.teachers, self.scheme.provides | self.scheme.offers)
        self._rationales_are_there(self.objective)
        if self.label_from != "gold" and self.rationales is None:
            raise ValueError(f"label_from: {self.label_from} needs a `rationales` section: its teacher gives labels")
        if self.label_from == "teacher" and self.rationales is not None and self.rationales.hint_retry is not None:
            raise ValueError(
                "rationales.hint_retry explains gold labels, but label_from: teacher learns the votes, which were "
                "wrong there: label and rationale would contradict each other. Set label_from: gold, or "
                "gold_else_teacher"
            )
        self._pictures_are_read()
        self._scheme_fits()
        self._ablations_exist()
        if self.evaluate.from_scratch and (self.student.config or self.student.fresh):
            raise ValueError("evaluate.from_scratch: the student itself starts from fresh weights. Remove it")
        return self

    def _scheme_fits(self) -> None:
        try:
            taken = sorted((self.scheme.provides | self.scheme.offers) & set(self.teachers))
            if taken:
                raise ValueError(f"it provides a teacher {taken[0]} itself. Rename the one under `teachers`")
            stages = self.stages
            check_stages(stages, self._sections)
            self.scheme.check_terms(self.objective, self.teachers)
            self._rationales_are_there(term for stage in stages for term in stage.terms)
        except ValueError as error:
            raise ValueError(f"scheme: {error}") from None
        self.scheme.check_recipe(self)

    def _rationales_are_there(self, terms: Iterable[Term]) -> None:
        for term in terms:
            if self.rationales is None and set(term.targets) != {"label"}:
                raise ValueError(
                    f"objective.{term.name}.targets: {list(term.targets)} need rationales, but the recipe has no "
                    "`rationales` section. Add one (kind gold takes the data's own), or keep to targets: [label]"
                )

    def _pictures_are_read(self) -> None:
        """What students that see pictures cannot do, and what teachers that are made of the student cannot."""
        picture = self.student.picture
        for name, teacher in self.teachers.items():
            view = teacher.own_view()
            if view is not None and view.picture is not None and self.scheme.writes:
                raise ValueError(
                    f"teachers.{name}.view.picture: where the student writes (scheme), a teacher reads that behind the "
                    "text that it read before, which a picture is not. Remove `picture`, or take kind: step_by_step"
                )
            if view is None or not teacher.moves:
                continue
            if (view.picture is None) != (picture is None):
                reads, do = ("pictures", "add `picture` to") if picture else ("text", "remove `picture` from")
                raise ValueError(f"teachers.{name}.view: it is the student, which reads {reads}: {do} the view")
        if picture is None:
            return
        if self.scheme.writes or len(self.scheme.learners) > 1:
            raise ValueError(
                "student.picture: schemes in which the student writes (on_policy) or several learn at once (mutual, "
                "self_distill) are for students that read text. Take kind: step_by_step, or remove `picture`"
            )
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
        stages = (stage.name for stage in self.stages)
        taken = (*stages, *self.scheme.learners, *TAKEN)
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
            if ablation in taken:
                raise ValueError(f"evaluate.ablations.{ablation}: this name is taken; choose another")
            try:
                terms = [term for term in self.objective if term.name in kept]
                self.scheme.alone().check_terms(terms, self.teachers)
            except ValueError as error:
                raise ValueError(f"evaluate.ablations.{ablation}: {error}") from None


def model_folder(run: Path, name: str) -> Path:
    """Where the finished model of an arm lies in a run's folder."""
    return run / "models" / name / "model"


def _refuse_circles(teachers: Mapping[str, TensorTeacherSpec], way: tuple[str, ...]) -> None:
    """Follows what the last teacher of ``way`` is made of, and so on down."""
    for member in teachers[way[-1]].made_of():
        if member in way:
            circle = " > ".join([*way[way.index(member) :], member])
            raise ValueError(f"{member}: it is made of itself ({circle}). Take it out of one of them")
        _refuse_circles(teachers, (*way, member))
