"""Response-based distillation: KL divergence from the teacher's softened distribution to the student's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill_llm.losses.base import Loss

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from distill_llm.core.signals import Signals


class ForwardKL(Loss):
    """temperature^2 * KL(teacher || student), nats per token, both softened by ``temperature``.

    Hinton et al. 2015, arXiv:1503.02531, sec. 2: the factor temperature^2 keeps the gradient's size when the
    temperature changes. The teacher gets no gradient.
    """

    kind: Literal["forward_kl"] = "forward_kl"
    temperature: float = Field(default=1.0, gt=0, description="softens both distributions")

    def __call__(self, student: Signals, teacher: Signals | None) -> Float[Tensor, " N"]:
        assert teacher is not None
        log_p = (teacher.logits.detach().float() / self.temperature).log_softmax(-1)
        log_q = (student.logits.float() / self.temperature).log_softmax(-1)
        return self.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
