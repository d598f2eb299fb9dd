"""Arms: every model that a recipe trains, stages of its scheme, ablations and controls, each with its own plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Literal

from distill_llm.core.errors import ConfigError
from distill_llm.core.example import Target
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.models.spec import StudentSpec
from distill_llm.objective import Term, targets_of
from distill_llm.recipe.recipe import Recipe
from distill_llm.schemes.base import Scheme
from distill_llm.schemes.stages import FROM_SCRATCH, STUDENT, Stage, describe, on_the_way
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.base import TensorTeacherSpec


@dataclass(frozen=True, slots=True)
class Arm:
    """``evaluate_target`` is what it is asked for on validation and test; ``after``: arms that must be trained before.
    One of 0 ``max_steps`` is saved as it starts.

    The role of a stage before the student's is assistant.
    """

    name: str
    role: Literal["assistant", "student", "control"]
    description: str
    student: StudentSpec
    teachers: Mapping[str, TensorTeacherSpec]
    terms: tuple[Term, ...]
    scheme: Scheme
    max_steps: int
    seed: int
    evaluate_target: Target
    after: tuple[str, ...] = ()
    scored: bool = True
    validated: bool = True

    @property
    def targets(self) -> tuple[Target, ...]:
        return targets_of(self.terms)

    def rows_of(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if row.target in self.targets]

    def recipe(self, whole: Recipe) -> Recipe:
        """The recipe of this training alone."""
        return whole.model_copy(
            update={
                "student": self.student,
                "teachers": dict(self.teachers),
                "objective": self.terms,
                "scheme": self.scheme,
                "train": whole.train.model_copy(update={"seed": self.seed}),
            }
        )


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameters of the student of each stage, and of the teachers that are run beside a student.

    Those of stages that teach under their own names are among ``stages``. ``beside``: of what else is trained with the
    student of a stage, such as its peers.
    """

    stages: Mapping[str, int]
    teachers: Mapping[str, int]
    beside: Mapping[str, int] = field(default_factory=dict)

    @property
    def student(self) -> int:
        return self.stages[STUDENT]

    def of_teacher(self, name: str) -> int:
        """Of a teacher, or of an earlier stage that teaches under its own name."""
        return self.teachers[name] if name in self.teachers else self.stages[name]


def needed_targets(recipe: Recipe) -> tuple[Target, ...]:
    """Targets that some arm trains on."""
    controls = (_label_term(),) if recipe.evaluate.controls else ()
    return targets_of([*recipe.objective, *(term for stage in recipe.stages for term in stage.terms), *controls])


def plan_arms(recipe: Recipe, rows: Sequence[Row], sizes: Sizes) -> list[Arm]:
    """The student first, then the stages before it, ablations (objectives with fewer terms, or fresh weights), and
    controls (labels only).

    The control with the same compute gets as many steps as the student's cost pays for, with all stages that it
    needs, where a row costs 6 * student parameters * its tokens, plus, for each teacher that is run on it, 2 * teacher
    parameters * the tokens that this teacher reads (Kaplan et al. 2020, arXiv:2001.08361, sec. 2.1), and 2 * student
    parameters * its tokens for each time that the scheme has the student read it besides. One that is cached runs once
    a row, not once a pass.
    """
    own_rows = [row for row in rows if row.target in targets_of(recipe.objective)]
    steps = recipe.train.max_steps or ceil(recipe.train.epochs * len(own_rows) / recipe.train.rows_per_step)
    stages = recipe.stages
    arms = [_stage_arm(recipe, stage, steps) for stage in reversed(stages)]
    for name, kept in recipe.evaluate.ablations.items():
        terms = tuple(term for term in recipe.objective if term.name in kept)
        arms.append(_arm_of_student(recipe, name, "student", describe(terms), terms, recipe.scheme.alone(), steps))
    if recipe.evaluate.from_scratch:
        fresh = recipe.student.model_copy(update={"fresh": True, "lora": None, "load_in": "full"})
        said, scheme = f"{describe(recipe.objective)}, from fresh weights", recipe.scheme.alone()
        arm = _arm_of_student(recipe, FROM_SCRATCH, "student", said, recipe.objective, scheme, steps)
        arms.append(replace(arm, student=fresh))
    label = (_label_term(),)
    for name in recipe.evaluate.controls:
        factor = 1.0
        if name == "labels_same_compute":
            passes = max(1.0, steps * recipe.train.rows_per_step / max(1, len(own_rows)))
            control = _arm_of_student(recipe, name, "control", "", label, StepByStep(), steps)
            paid = {stage.name for stage in on_the_way(stages)}
            trained = [arm for arm in arms[: len(stages)] if arm.name in paid and arm.max_steps]
            spent = sum(arm.max_steps / steps * row_cost(arm, rows, sizes, passes) for arm in trained)
            factor = spent / row_cost(control, rows, sizes, passes)
        same = "steps" if name == "labels_same_steps" else f"compute: {factor:.2f} x the steps"
        number = max(1, round(steps * factor))
        arms.append(_arm_of_student(recipe, name, "control", f"labels only, same {same}", label, StepByStep(), number))
    return arms


def choose(arms: Sequence[Arm], names: Sequence[str]) -> list[Arm]:
    """The named arms, and those that they need; ``all`` names every one."""
    if "all" in names:
        return list(arms)
    known = {arm.name: arm for arm in arms}
    for name in names:
        if name not in known:
            raise ConfigError(f"--arm {name}: this recipe has no such arm; expected all or one of {sorted(known)}.")
    chosen = dict.fromkeys(names)
    while more := [needed for name in chosen for needed in known[name].after if needed not in chosen]:
        chosen |= dict.fromkeys(more)
    return [known[name] for name in chosen]


def _stage_arm(recipe: Recipe, stage: Stage, steps: int) -> Arm:
    return Arm(
        name=stage.name,
        role="student" if stage.name == STUDENT else "assistant",
        description=stage.description,
        student=stage.student,
        teachers=stage.teachers,
        terms=stage.terms,
        scheme=stage.scheme,
        max_steps=max(1, round(steps * stage.share_of_steps)) if stage.share_of_steps else 0,
        seed=recipe.training_seed + stage.seed_shift,
        evaluate_target=_asked(recipe, stage.terms or recipe.objective),
        after=stage.after,
        scored=stage.scored,
        validated=stage.validated,
    )


def _arm_of_student(
    recipe: Recipe,
    name: str,
    role: Literal["student", "control"],
    description: str,
    terms: tuple[Term, ...],
    scheme: Scheme,
    steps: int,
) -> Arm:
    """One training of the recipe's student."""
    asked = "label" if role == "control" else _asked(recipe, terms)
    return Arm(
        name, role, description, recipe.student, recipe.teachers, terms, scheme, steps, recipe.training_seed, asked
    )


def _asked(recipe: Recipe, terms: Sequence[Term]) -> Target:
    targets = targets_of(terms)
    return recipe.evaluate.target if recipe.evaluate.target in targets else targets[0]


def _label_term() -> Term:
    return Term(name="label", loss=CrossEntropy(), targets=("label",))


def row_cost(arm: Arm, rows: Sequence[Row], sizes: Sizes, passes: float) -> float:
    """Mean floating point operations of a row of the arm."""
    student = sizes.stages.get(arm.name, sizes.student) + sizes.beside.get(arm.name, 0)
    total, count = 0.0, 0
    for row in rows:
        if row.target not in arm.targets:
            continue
        asked: dict[str, float] = {}  # each teacher's share of the training: until its last term ends
        for term in arm.terms:
            if term.teacher is None or term.teacher not in arm.teachers:
                continue  # one that the scheme provides is trained, and paid for as such
            if row.target in term.targets:
                asked[term.teacher] = max(asked.get(term.teacher, 0.0), term.until)
        total += (6 + 2 * arm.scheme.extra_passes(arm.terms, row.target)) * student * row.num_tokens
        for name, share in asked.items():
            for one, part in _runs(arm.teachers, name, share, passes):
                total += part * 2 * sizes.of_teacher(one) * row.tokens_for(one)
        count += 1
    return total / max(count, 1)


def _runs(
    teachers: Mapping[str, TensorTeacherSpec], name: str, share: float, passes: float
) -> Iterator[tuple[str, float]]:
    """A teacher and all that it is made of, each with the share of the student's ``passes`` in which it is run."""
    teacher = teachers[name]
    yield name, share
    for member in teacher.made_of():
        yield from _runs(teachers, member, 1 / passes if teacher.asked_once else share, passes)
