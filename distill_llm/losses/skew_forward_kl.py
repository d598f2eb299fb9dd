"""Forward KL to a student that is helped by a share of the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill_llm.losses.base import Divergence, log_mixture, relative_entropy

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class SkewForwardKL(Divergence):
    """temperature^2 * KL(teacher || mixture * teacher + (1 - mixture) * student), nats per token.

    Ko et al. 2024, DistiLLM, arXiv:2402.03898, sec. 3.1: the mixture bounds the loss and its gradient.
    """

    kind: Literal["skew_forward_kl"] = "skew_forward_kl"
    mixture: float = Field(default=0.1, gt=0, lt=1, description="the teacher's share beside the student (alpha)")

    def between(self, log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        return relative_entropy(log_p, log_mixture(log_p, log_q, self.mixture))
