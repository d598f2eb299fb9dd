"""A scheme is who teaches whom: hooks around the one trainer, each with the usual default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill_llm.core.component import Component
from distill_llm.core.signals import Batch, LazySignals, Signals, select_rows, signals_of
from distill_llm.core.sparse import SparseSignals
from distill_llm.models.forward import forward
from distill_llm.schemes.stages import STUDENT, Sections, Stage, describe
from distill_llm.teachers.base import DeepTeacher, LazyTeacher

if TYPE_CHECKING:
    from distill_llm.core.example import Target
    from distill_llm.core.features import Reading
    from distill_llm.data.collate import Collator
    from distill_llm.models.head import OutputHead
    from distill_llm.objective import Objective, Term
    from distill_llm.teachers.base import TensorTeacher

Taught = Signals | LazySignals | SparseSignals
Comparison = tuple[Signals | LazySignals, Mapping[str, Taught]]
"""A student's signals, and those of its teachers. A teacher's are lazy only where the student's are."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a training stands before an optimiser step: ``step`` steps are done, which is a share ``progress`` (0..1).

    ``objective`` has its terms of this step. ``collator`` is what the batches were made with.
    """

    step: int
    progress: float
    seed: int
    objective: Objective
    collator: Collator
    tokenizer: Any


class Scheme(Component):
    """Base of all schemes. A new hook belongs here only with a default that suits every other scheme."""

    writes: ClassVar[bool] = False
    """It has the student write some of the texts that it learns from."""

    def resolved(self, sections: Sections) -> Scheme:
        """With all that configs of models decide, such as sizes between two of them; reads no weights.

        Called before anything is checked or written. Raises ConfigError where a config cannot be had.
        """
        return self

    def stages(self, sections: Sections) -> tuple[Stage, ...]:
        """The trainings of a recipe, each after those that it needs; the student's is the last.

        Raises ValueError where the scheme cannot be had with these sections. Reads no file.
        """
        terms = sections.objective
        return (Stage(STUDENT, describe(terms), sections.student, sections.teachers, terms, scheme=self),)

    def alone(self) -> Scheme:
        """The scheme of an ablation, whose objective has fewer terms: one training of one model."""
        return self

    def at_step(self, objective: Objective, step: int, seed: int) -> Objective:
        """The objective of one optimiser step, the ``step``-th from 0; what is drawn for it is drawn from ``seed``."""
        return objective

    def check_recipe(self, recipe: Any) -> None:
        """Raises ValueError where the sections of ``recipe``, a Recipe, do not suit it. Reads no file."""

    def check(self, recipe: Any) -> None:
        """Raises ConfigError where what it needs cannot be had. Loads no weights; called before anything is written."""

    def extra_passes(self, terms: Sequence[Term], target: Target) -> float:
        """How often the student reads a row of ``target`` besides its training step, without a gradient, on average
        over a training with these terms: for the compute of an arm."""
        return 0.0

    def written_tokens(self, target: Target) -> int:
        """Tokens of the longest text that the student may write for ``target``; 0 where it writes none."""
        return 0

    def prepare(self, batches: list[Batch], model: Any, moment: Moment) -> list[Batch]:
        """Rewrites the batches of one optimiser step, before their tokens are counted. ``model`` is not wrapped."""
        return batches

    def compare(
        self,
        model: Any,
        teachers: Mapping[str, TensorTeacher],
        batch: Batch,
        objective: Objective,
        head: OutputHead | None = None,
    ) -> list[Comparison]:
        """Forwards student and teachers. One pair, unless peers teach each other.

        ``model`` is the wrapped model: calling an inner module would skip the gradient's reduction over ranks.
        ``head``: the student's, where its logits are to be made in chunks; None: all at once.
        """
        reading = objective.reading()
        if head is not None:
            student = head.read(model, batch, reading)
            return [(student, _lazily(teachers, batch, objective, student))]
        passed = forward(model, batch, reading)
        student = signals_of(passed.outputs.logits, batch, passed.at)
        if reading:
            from distill_llm.models.layers import heads_of

            student = replace(student, features=passed.features(batch, reading, heads_of(model)))
        said = {}
        for name, teacher in teachers.items():
            if not any(term.teacher == name for term in objective.terms):
                continue  # its terms have ended
            rows = objective.rows_for(name, batch)
            if bool(rows.any()):
                said[name] = _asked(teacher, "signals", select_rows(batch, rows), objective.reading(name))
            else:
                said[name] = student.where(student.targets < 0)
        return [(student, said)]


def _lazily(
    teachers: Mapping[str, TensorTeacher], batch: Batch, objective: Objective, student: LazySignals
) -> dict[str, Taught]:
    """What each teacher says of the targets that it is asked about; nothing of one that has no token here."""
    said: dict[str, Taught] = {}
    here = set(student.tokens.spans)
    for name, teacher in teachers.items():
        asked = objective.asks(name) & here
        if not asked:
            continue
        part = batch if asked == here else select_rows(batch, objective.rows_for(name, batch))
        how = "lazy_signals" if isinstance(teacher, LazyTeacher) else "signals"
        said[name] = _asked(teacher, how, part, objective.reading(name))
    return said


def _asked(teacher: TensorTeacher, how: Literal["signals", "lazy_signals"], batch: Batch, reading: Reading) -> Taught:
    """Its signals, with its layers where the objective looks at them."""
    if not reading:
        return getattr(teacher, how)(batch)
    assert isinstance(teacher, DeepTeacher), "checked when the teachers were opened"
    return getattr(teacher, how)(batch, reading)
