"""A scheme is who teaches whom: hooks around the one trainer, each with the usual default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distill_llm.core.component import Component
from distill_llm.core.signals import Batch, Signals, model_inputs, select_rows, signals_of

if TYPE_CHECKING:
    from distill_llm.objective import Objective
    from distill_llm.teachers.base import TensorTeacher

Comparison = tuple[Signals, Mapping[str, Signals]]
"""A student's signals, and those of its teachers."""


class Scheme(Component):
    """Base of all schemes. A new hook belongs here only with a default that suits every other scheme."""

    def prepare(self, batches: list[Batch], model: Any) -> list[Batch]:
        """Rewrites the batches of one optimiser step, before their tokens are counted."""
        return batches

    def compare(
        self, model: Any, teachers: Mapping[str, TensorTeacher], batch: Batch, objective: Objective
    ) -> list[Comparison]:
        """Forwards student and teachers. One pair, unless peers teach each other.

        ``model`` is the wrapped model: calling an inner module would skip the gradient's reduction over ranks.
        """
        student = signals_of(model(**model_inputs(batch)).logits, batch)
        said = {}
        for name, teacher in teachers.items():
            rows = objective.rows_for(name, batch)
            if bool(rows.any()):
                said[name] = teacher.signals(select_rows(batch, rows))
            else:
                said[name] = student.where(student.targets < 0)
        return [(student, said)]
