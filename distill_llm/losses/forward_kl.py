"""Response-based distillation: the student covers what the teacher holds possible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill_llm.losses.base import Divergence, relative_entropy

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class ForwardKL(Divergence):
    """temperature^2 * KL(teacher || student), nats per token.

    Hinton et al. 2015, arXiv:1503.02531, sec. 2; word by word for language models: Kim & Rush 2016, arXiv:1606.07947,
    sec. 3.1.
    """

    kind: Literal["forward_kl"] = "forward_kl"

    def between(self, log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        return relative_entropy(log_p, log_q)
