"""The student's own average over its past steps, as its teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from distill_llm.teachers.base import TensorTeacher, TensorTeacherSpec
from distill_llm.teachers.beside import ModelBeside
from distill_llm.teachers.student import StudentFacts
from distill_llm.teachers.view import Reader, TeacherView

if TYPE_CHECKING:
    from torch import Tensor, nn


class EmaTeacher(ModelBeside):
    """A copy of ``student`` whose weights follow the student's; those that do not learn are shared, not copied."""

    whose = "teachers: ema"

    def __init__(self, student: nn.Module, width: int | None = None, *, decay: float):
        still = {id(weight): weight for weight in student.parameters() if not weight.requires_grad}
        learning = [name for name, weight in student.named_parameters() if weight.requires_grad]
        model = copy.deepcopy(student, still)
        super().__init__(model, width)
        weights = dict(model.named_parameters())
        self._decay = decay
        self._moving = {name: weights[name] for name in learning}

    def after_step(self, model: nn.Module, step: int) -> None:
        """Moves towards ``model``, which has just made ``step`` steps."""
        import torch
        from accelerate.utils import extract_model_from_parallel

        inner: Any = extract_model_from_parallel(model, keep_fp32_wrapper=True)
        weights = dict(inner.named_parameters())
        decay = min(1 - 1 / (step + 1), self._decay)
        with torch.no_grad():
            for name, mean in self._moving.items():
                mean.lerp_(_whole(weights[name]).to(mean.device), 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The weights that move, by name."""
        return {name: weight.detach() for name, weight in self._moving.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to what ``state`` gave; raises KeyError where it is that of another model."""
        import torch

        with torch.no_grad():
            for name, weight in self._moving.items():
                weight.copy_(state[name])


def _whole(weight: Tensor) -> Tensor:
    """The weight itself where FSDP has shared it out among processes, all of which ask for it."""
    from torch.distributed.tensor import DTensor

    return weight.full_tensor() if isinstance(weight, DTensor) else weight


class Ema(TensorTeacherSpec):
    """The exponential moving average of the student's weights, moved after every optimiser step.

    Tarvainen & Valpola 2017, arXiv:1703.01780, sec. 2. As in their code, the decay is at most 1 - 1/(step + 1): a
    plain mean of all weights so far, until the exponential one is the better. Ours sees the student's own input, unless
    it has a `view`; the only noise between the two is the student's dropout.
    """

    moves: ClassVar[bool] = True
    kind: Literal["ema"] = "ema"
    decay: float = Field(
        default=0.999, ge=0, lt=1, description="what is kept of the average at each step; 0: the student as it is"
    )
    view: TeacherView | None = Field(default=None, description="absent: it reads what the student reads")

    def own_view(self) -> TeacherView | None:
        return self.view

    def reader(self, student: Any = None) -> Reader | None:
        if self.view is None or student is None:
            return None
        painter = (
            student.painter.as_seen(self.view.picture, "teachers: ema: view.picture") if self.view.picture else None
        )
        return Reader(self.view, student.tokenizer, student.model.config, "", painter)

    def open(self, student: StudentFacts, members: Sequence[TensorTeacher] = ()) -> TensorTeacher:
        assert student.model is not None, "an ema teacher is a copy of StudentFacts.model"
        return EmaTeacher(student.model, student.width, decay=self.decay)

    def num_parameters(self, student_parameters: int) -> int:
        return student_parameters
