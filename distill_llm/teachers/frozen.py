"""A frozen Hugging Face model that is run beside the student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distill_llm.core.signals import Batch, LazySignals, Signals, model_inputs, signals_of
from distill_llm.teachers.base import StudentFacts, TensorTeacher, TensorTeacherSpec

if TYPE_CHECKING:
    from torch import nn

    from distill_llm.models.head import OutputHead


class FrozenTeacher:
    """``width``: words that it speaks of; None where its head has no more than its tokenizer."""

    def __init__(self, model: nn.Module, width: int | None = None):
        self._model: Any = model.eval().requires_grad_(False)
        self._width = width
        self._head: OutputHead | None = None

    def signals(self, batch: Batch) -> Signals:
        import torch

        with torch.no_grad():
            return signals_of(self._model(**model_inputs(batch)).logits[..., : self._width], batch)

    def lazy_signals(self, batch: Batch) -> LazySignals:
        import torch

        from distill_llm.models.head import OutputHead

        if self._head is None:
            self._head = OutputHead(self._model, width=self._width, whose="teachers: frozen")
        with torch.no_grad():
            return self._head.read(self._model, batch)


class Frozen(TensorTeacherSpec):
    """Sees the same input as the student, prefix included."""

    kind: Literal["frozen"] = "frozen"
    model: str = Field(min_length=1, description="Hub id or folder")
    revision: str = "main"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def check(self) -> None:
        from distill_llm.models.load import read_config

        read_config(self.model, self.revision, where=f"teachers: frozen '{self.model}'")

    def open(self, student: StudentFacts) -> TensorTeacher:
        from distill_llm.models.load import load_model, read_config, read_tokenizer

        where = f"teachers: frozen '{self.model}'"
        vocabulary = read_tokenizer(self.model, self.revision, where=where).get_vocab()
        student.must_share(vocabulary, read_config(self.model, self.revision, where=where), where=where)
        model = load_model(self.model, self.revision, where=where, dtype=self.dtype)
        return FrozenTeacher(model.to(student.device), student.width)

    def num_parameters(self) -> int:
        from distill_llm.models.load import count_parameters

        return count_parameters(self.model, self.revision, where=f"teachers: frozen '{self.model}'")
