"""Cross-entropy with the target's own tokens (hard labels)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distill_llm.losses.base import Loss

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from distill_llm.core.signals import Signals


class CrossEntropy(Loss):
    """-log p_student(token), nats per token."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    needs_teacher: ClassVar[bool] = False

    def __call__(self, student: Signals, teacher: Signals | None) -> Float[Tensor, " N"]:
        from torch.nn.functional import cross_entropy

        return cross_entropy(student.logits.float(), student.token_ids, reduction="none")
