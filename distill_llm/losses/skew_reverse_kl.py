"""Reverse KL to a teacher that is helped by a share of the student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill_llm.losses.base import Divergence, log_mixture, relative_entropy

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class SkewReverseKL(Divergence):
    """temperature^2 * KL(student || mixture * student + (1 - mixture) * teacher), nats per token.

    Ko et al. 2024, DistiLLM, arXiv:2402.03898, sec. 3.1: the mixture bounds the loss where the teacher says never.
    """

    kind: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    mixture: float = Field(default=0.1, gt=0, lt=1, description="the student's share beside the teacher (alpha)")

    def between(self, log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        return relative_entropy(log_q, log_mixture(log_q, log_p, self.mixture))
