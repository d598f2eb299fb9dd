"""Between forward and reverse KL: both models against their mixture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill_llm.losses.base import Divergence, log_mixture, relative_entropy

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class JensenShannon(Divergence):
    """temperature^2 * generalised Jensen-Shannon divergence, nats per token.

    Agarwal et al. 2024, GKD, arXiv:2306.13649, eq. 1: with m = mixture * teacher + (1 - mixture) * student, it is
    mixture * KL(teacher || m) + (1 - mixture) * KL(student || m). Towards 0 its gradient is that of the forward KL,
    towards 1 of the reverse KL, each times the share, which goes to 0: take those losses themselves there.
    """

    kind: Literal["jensen_shannon"] = "jensen_shannon"
    mixture: float = Field(default=0.5, gt=0, lt=1, description="the teacher's share (beta)")

    def between(self, log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        log_m = log_mixture(log_p, log_q, self.mixture)
        return self.mixture * relative_entropy(log_p, log_m) + (1 - self.mixture) * relative_entropy(log_q, log_m)
