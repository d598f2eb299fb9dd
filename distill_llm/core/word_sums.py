"""Sums over all words of a vocabulary but a few, with gradients of their own: each pass over [N, V] costs time.

Left to autograd, each of the copies, sums and lookups here would be one or two more of them. N tokens, V vocabulary, K
words of each token, S draws.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_NEARLY_NEVER = torch.finfo(torch.float32).min / 4
"""Not -inf, or a sum over no word at all would be NaN, and so its gradient."""


def coarse_logits(
    logits: Float[Tensor, "N V"], word_ids: Int[Tensor, "N K"], temperature: float
) -> Float[Tensor, "N K+1"]:
    """The logits of K words over ``temperature``, and, last, the logarithm of the sum of exp of all others."""
    return _Coarse.apply(logits, word_ids, temperature)  # type: ignore[return-value]


def mean_cross_entropy(
    logits: Float[Tensor, "N V"], word_ids: Int[Tensor, "N S"], temperature: float
) -> Float[Tensor, " N"]:
    """The mean of -log softmax(logits / temperature) over the given words, which may repeat."""
    return _MeanCrossEntropy.apply(logits, word_ids, temperature)  # type: ignore[return-value]


class _Coarse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, word_ids: Tensor, temperature: float) -> Tensor:
        top = logits.gather(-1, word_ids).float()
        others = logits.to(torch.float32, copy=True).scatter_(-1, word_ids, _NEARLY_NEVER)
        weights, largest, total = _weights(others, temperature)
        ctx.save_for_backward(word_ids, weights, total)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return torch.cat([top / temperature, largest / temperature + total.log()], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Any) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        word_ids, weights, total = ctx.saved_tensors
        (gradient,) = outer
        gradient = gradient / ctx.temperature
        found = weights * (gradient[:, -1:] / total)
        return found.scatter_(-1, word_ids, gradient[:, :-1]).to(ctx.dtype), None, None


class _MeanCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, word_ids: Tensor, temperature: float) -> Tensor:
        weights, largest, total = _weights(logits.to(torch.float32, copy=True), temperature)
        ctx.save_for_backward(word_ids, weights, total)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        said = logits.gather(-1, word_ids).float().mean(-1)
        return (largest[:, 0] - said) / temperature + total[:, 0].log()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Any) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        word_ids, weights, total = ctx.saved_tensors
        gradient = outer[0][:, None] / ctx.temperature
        found = weights * (gradient / total)
        share = (-gradient / word_ids.size(-1)).expand(word_ids.shape)
        return found.scatter_add_(-1, word_ids, share).to(ctx.dtype), None, None


def _weights(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """exp of the logits beside the largest, over ``temperature``, in place; the largest; the sum."""
    largest = logits.amax(-1, keepdim=True)
    logits.sub_(largest)
    if temperature != 1:
        logits.div_(temperature)
    logits.exp_()
    return logits, largest, logits.sum(-1, keepdim=True)
