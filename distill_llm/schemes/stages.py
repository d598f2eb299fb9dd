"""Stages: the trainings that a scheme makes of one recipe, each an ordinary training of one student."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill_llm.models.spec import StudentSpec
from distill_llm.objective import Term
from distill_llm.teachers.base import TensorTeacherSpec

if TYPE_CHECKING:
    from distill_llm.schemes.base import Scheme

STUDENT = "student"
"""The last stage: the model that the recipe is for."""
FROM_SCRATCH = "from_scratch"
"""A student of the same sizes with fresh weights."""
TAKEN = ("teacher", "labels_same_steps", "labels_same_compute", FROM_SCRATCH)
"""Names of other models of a scorecard."""


@dataclass(frozen=True, slots=True)
class Sections:
    """What a scheme makes stages of. ``model_of`` tells where the finished model of a stage will lie."""

    student: StudentSpec
    teachers: Mapping[str, TensorTeacherSpec]
    objective: tuple[Term, ...]
    model_of: Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Stage:
    """One training, with the sections of a recipe that are its own.

    ``teachers`` has the models of earlier stages under the names of these stages; ``after`` are the stages that it
    needs, as teachers or to start from. All stages read the same rows, so that their students share tokenizer and view.
    """

    name: str
    description: str
    student: StudentSpec
    teachers: Mapping[str, TensorTeacherSpec]
    terms: tuple[Term, ...]
    scheme: Scheme
    after: tuple[str, ...] = ()
    share_of_steps: float = 1.0
    """Of the steps that the recipe names; 0: it is not trained, and saved as it starts and as its scheme saves."""
    seed_shift: int = 0
    """Added to the recipe's seed: other weights to start from, and another order of the rows."""
    scored: bool = True
    """Its model answers the test split."""
    validated: bool = True
    """Validation chooses among its checkpoints and learning rates; else the last step is kept, of the recipe's rate."""


def describe(terms: Sequence[Term]) -> str:
    return " + ".join(term.name.replace("_", " ") for term in terms)


def outline(stages: Sequence[Stage]) -> list[str]:
    """A line for each stage of several; none where there is but one."""
    if len(stages) < 2:
        return []
    lines = []
    for number, stage in enumerate(stages, start=1):
        share = f"; {stage.share_of_steps:.0%} of the steps" if stage.share_of_steps else "; not trained"
        steps = "" if stage.share_of_steps == 1 else share
        lines.append(f"stage {number} of {len(stages)}, {stage.name}: {stage.description}{steps}")
    return lines


def on_the_way(stages: Sequence[Stage]) -> list[Stage]:
    """The last stage, and those that it needs, in their order; others are there to be compared with it."""
    needed = {stages[-1].name}
    for stage in reversed(stages):
        needed |= set(stage.after) if stage.name in needed else set()
    return [stage for stage in stages if stage.name in needed]


def begun_by(student: StudentSpec, folder: str) -> StudentSpec:
    """``student``, who starts from the model in ``folder``, that of an earlier stage, and reads as before."""
    own = ("prefixes", "prefix_side", "attention", "chat", "picture")
    kept = {name: getattr(student, name) for name in own}
    return StudentSpec(model=folder, tokenizer=student.tokenizer or student.model, **kept)


def check_stages(stages: Sequence[Stage], sections: Sections) -> None:
    """Raises ValueError where a stage's name stands for something else already, or a teacher cannot teach its terms."""
    names = [stage.name for stage in stages]
    assert names[-1] == STUDENT
    assert all(set(stage.after) <= set(names[:number]) for number, stage in enumerate(stages))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two stages have the same name: {twice} (the last stage is '{STUDENT}'). Rename one")
    taken = sorted(set(names) & {*sections.teachers, *TAKEN})
    if taken:
        raise ValueError(f"a stage has the name of a teacher or of a control: {taken}. Rename it")
    for stage in stages:
        if not stage.share_of_steps:
            continue
        try:
            check_terms(stage.terms, stage.teachers, stage.scheme.provides)
        except ValueError as error:
            raise ValueError(f"stage '{stage.name}': {error}") from None


def check_terms(
    terms: Sequence[Term], teachers: Mapping[str, TensorTeacherSpec], provided: Set[str] = frozenset()
) -> None:
    """Raises ValueError where a term's teacher is not there or cannot teach it, or all terms end too early.

    ``provided``: teachers that a scheme has itself.
    """
    for term in terms:
        if term.teacher is None or term.teacher in provided:
            continue
        if term.teacher not in teachers:
            raise ValueError(
                f"objective.{term.name}.teacher: '{term.teacher}' is not one of {sorted({*teachers, *provided})}. "
                "Add it under `teachers:`"
            )
        teacher = teachers[term.teacher]
        unknown = [target for target in term.targets if target not in teacher.knows]
        if unknown:
            raise ValueError(
                f"objective.{term.name}.targets: teacher '{term.teacher}' says nothing of {unknown}, but of "
                f"{sorted(teacher.knows)} only. Take these out, or name another teacher"
            )
        try:
            teacher.check_others(teachers)
            teacher.check_loss(term.loss)
        except ValueError as error:
            raise ValueError(f"objective.{term.name}.loss: {error}") from None
    if all(term.until < 1 for term in terms):
        raise ValueError("objective: every term ends (`until`) before the training does; let one go on to the end")
