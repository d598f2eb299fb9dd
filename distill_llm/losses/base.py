"""The contract of a loss: N supervised tokens in, N values out. No mask, no mean, no weight."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from distill_llm.core.component import Component

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from distill_llm.core.signals import Signals


class Loss(Component):
    needs_teacher: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, student: Signals, teacher: Signals | None) -> Float[Tensor, " N"]:
        """Loss of each token, in nats. The teacher's signals stand at the same tokens as the student's."""
