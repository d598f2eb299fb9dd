"""Squared differences of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill_llm.losses.base import Loss

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from distill_llm.core.signals import Signals


class LogitMSE(Loss):
    """Mean over the vocabulary of squared differences of logits, each model's centred, in squared nats.

    Ba & Caruana 2014, arXiv:1312.6184, sec. 2.2. Centred, because a constant on all logits of a token says nothing;
    half of it is what temperature^2 * KL tends to at high temperatures (Hinton et al. 2015, arXiv:1503.02531, 2.1).
    Words that a model hardly expects weigh as much as all others: of little use at large vocabularies. A word whose
    logit is -inf in either model has no difference, and is left out.
    """

    kind: Literal["logit_mse"] = "logit_mse"

    def __call__(self, student: Signals, teacher: Signals | None) -> Float[Tensor, " N"]:
        assert teacher is not None
        z, t = student.logits.float(), teacher.logits.detach().float()
        never = (z == float("-inf")) | (t == float("-inf"))
        words = (~never).sum(-1, keepdim=True).clamp_min(1)
        difference = (z - t).masked_fill(never, 0.0)
        centred = (difference - difference.sum(-1, keepdim=True) / words).masked_fill(never, 0.0)
        return (centred.square() / words).sum(-1)
