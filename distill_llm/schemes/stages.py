"""Stages: the trainings that a scheme makes of one recipe, each an ordinary training of one student."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill_llm.models.spec import StudentSpec
from distill_llm.objective import Term
from distill_llm.teachers.base import TensorTeacherSpec

if TYPE_CHECKING:
    from distill_llm.schemes.base import Scheme

STUDENT = "student"
"""The last stage: the model that the recipe is for."""


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
    """Of the steps that the recipe names."""
    seed_shift: int = 0
    """Added to the recipe's seed: other weights to start from, and another order of the rows."""
    scored: bool = True
    """Its model answers the test split."""


def describe(terms: Sequence[Term]) -> str:
    return " + ".join(term.name.replace("_", " ") for term in terms)


def check_stages(stages: Sequence[Stage], sections: Sections) -> None:
    """Raises ValueError where a stage's name is also that of one of the recipe's teachers."""
    names = [stage.name for stage in stages]
    assert names[-1] == STUDENT
    assert len(set(names)) == len(names)
    assert all(set(stage.after) <= set(names[:number]) for number, stage in enumerate(stages))
    taken = sorted(set(names) & set(sections.teachers))
    if taken:
        raise ValueError(f"a stage and a teacher have the same name: {taken}. Rename the teacher")
