"""A teacher that reads columns of its own, and says what it has to say at the student's tokens.

B rows, T positions, N tokens of the student, M of the teacher, L label tokens of the longest row, V vocabulary,
D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distill_llm.core.signals import (
    IGNORE_INDEX,
    Batch,
    LazySignals,
    Signals,
    aligned_labels,
    batch_of_view,
    tokens_of,
)
from distill_llm.teachers.base import LazyTeacher, MovingTeacher, TensorTeacher

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor, nn

    from distill_llm.teachers.view import Reader


class ViewedTeacher:
    """``name`` is the recipe's, by which the batch's columns are found; ``reader`` says how they are made."""

    def __init__(self, teacher: TensorTeacher, name: str, reader: Reader):
        assert isinstance(teacher, LazyTeacher), "all teachers with a model are"
        self.teacher: Any = teacher
        self.name, self.reader = name, reader

    def signals(self, batch: Batch) -> Signals:
        """What the teacher says of the counterparts of the student's supervised tokens, in row order."""
        own = batch_of_view(batch, self.name)
        said = self.teacher.signals(own)
        labels = aligned_labels(batch)
        rows, columns = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
        of_row = (aligned_labels(own) != IGNORE_INDEX).nonzero(as_tuple=True)[0]
        places, counterparts = _counterparts(batch, own["places"], rows, columns, of_row)
        return Signals(
            logits=said.logits[counterparts],
            token_ids=labels[rows, columns],
            targets=batch["targets"][rows],
            agreement=batch["agreement"][rows] if "agreement" in batch else None,
            known=places >= 0,
        )

    def lazy_signals(self, batch: Batch) -> LazySignals:
        """The same, without logits yet."""
        own = batch_of_view(batch, self.name)
        said = self.teacher.lazy_signals(own)
        tokens = tokens_of(batch)
        places, counterparts = _counterparts(batch, own["places"], tokens.rows, tokens.columns, said.tokens.rows)
        return replace(said, tokens=tokens, hidden=said.hidden[counterparts], known=places >= 0)


class MovingViewedTeacher(ViewedTeacher):
    """One that follows the student while it learns."""

    def after_step(self, model: nn.Module, step: int) -> None:
        self.teacher.after_step(model, step)

    def state(self) -> dict[str, Tensor]:
        return self.teacher.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.teacher.restore(state)


def viewed(teacher: TensorTeacher, name: str, reader: Reader) -> ViewedTeacher:
    """``teacher``, reader rows through its view."""
    moves = isinstance(teacher, MovingTeacher)
    return (MovingViewedTeacher if moves else ViewedTeacher)(teacher, name, reader)


def _counterparts(
    batch: Batch,
    places: Int[Tensor, "B L"],
    rows: Int[Tensor, " N"],
    columns: Int[Tensor, " N"],
    of_row: Int[Tensor, " M"],
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Of the student's tokens at ``rows``, ``columns``: their places in the teacher's row (-1: none), and which of the
    teacher's M tokens stand there (any, for none). ``of_row``: the row of each of these; a row's stand together."""
    import torch

    number = (aligned_labels(batch) != IGNORE_INDEX).cumsum(1) - 1  # of a row's label token, from 0
    places = places[rows, number[rows, columns]]
    numbers = torch.arange(len(of_row), device=of_row.device)
    first = of_row.new_zeros(len(batch["labels"])).scatter_reduce(0, of_row, numbers, "amin", include_self=False)
    return places, first[rows] + places.clamp_min(0)
