"""The student keeps to what the teacher holds likely."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill_llm.losses.base import Divergence, relative_entropy

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class ReverseKL(Divergence):
    """temperature^2 * KL(student || teacher), nats per token (Gu et al. 2024, MiniLLM, arXiv:2306.08543, sec. 2.1).

    Here token by token on given text, not by policy gradient on the student's own.
    """

    kind: Literal["reverse_kl"] = "reverse_kl"

    def between(self, log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        return relative_entropy(log_q, log_p)
