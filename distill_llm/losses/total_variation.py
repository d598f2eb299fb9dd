"""Half the sum of the differences in probability."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distill_llm.losses.base import Divergence

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class TotalVariation(Divergence):
    """temperature * half of sum |teacher - student|, 0..1 at temperature 1, no unit.

    Wen et al. 2023, f-divergence distillation, arXiv:2307.15190, sec. 3.2. Bounded: tokens on which the two are far
    apart do not outweigh all others. It grows with the difference in logits, not with its square, so temperature^1 is
    what keeps the size of its gradient.
    """

    kind: Literal["total_variation"] = "total_variation"
    order: ClassVar[int] = 1

    def between(self, log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
