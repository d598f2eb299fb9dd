"""A scheme is who teaches whom: hooks around the one trainer, each with the usual default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from distill_llm.core.component import Component
from distill_llm.core.signals import Batch, LazySignals, Signals, select_rows, signals_of
from distill_llm.core.sparse import SparseSignals
from distill_llm.models.forward import forward
from distill_llm.schemes.stages import STUDENT, Sections, Stage, describe
from distill_llm.teachers.base import DeepTeacher, LazyTeacher

if TYPE_CHECKING:
    from distill_llm.core.features import Reading
    from distill_llm.models.head import OutputHead
    from distill_llm.objective import Objective
    from distill_llm.teachers.base import TensorTeacher

Taught = Signals | LazySignals | SparseSignals
Comparison = tuple[Signals | LazySignals, Mapping[str, Taught]]
"""A student's signals, and those of its teachers. A teacher's are lazy only where the student's are."""


class Scheme(Component):
    """Base of all schemes. A new hook belongs here only with a default that suits every other scheme."""

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

    def prepare(self, batches: list[Batch], model: Any) -> list[Batch]:
        """Rewrites the batches of one optimiser step, before their tokens are counted."""
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
