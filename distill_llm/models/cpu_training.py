"""What costs a training on a CPU time without need, done otherwise: the masks of dropout, and attention with them.

torch's attention with dropout, or with a bias that is learned (T5's), is put together there from many small operations,
in float32 whatever autocast says. Imports torch and transformers at the top: import it inside functions.

B rows, H heads (G of keys), Q positions that ask, K positions that are asked, D size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distill_llm.models.cheap_dropout import CheapDropout, can_draw, draw_noise

_SDPA = "sdpa"


@contextmanager
def quick_on_cpu(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model's ``nn.Dropout`` is cheap, and so is `sdpa` attention where it is trained on a CPU.

    For a forward pass and its backward pass, which may compute layers anew. Nothing of it stays on the model. What a
    model's code drops by ``torch.nn.functional.dropout`` is torch's as before.
    """
    swapped = [part for part in model.modules() if type(part) is nn.Dropout]
    before = AttentionInterface()[_SDPA]
    for part in swapped:
        part.__class__ = CheapDropout
    AttentionInterface.register(_SDPA, _Attend())
    try:
        yield
    finally:
        AttentionInterface.register(_SDPA, before)
        for part in swapped:
            part.__class__ = nn.Dropout


class _Attend:
    """One layer's attention, in the form that transformers asks for; what gains nothing here is left to its own."""

    def __init__(self) -> None:
        self._masks: dict[int, tuple[Tensor, Tensor]] = {}  # kept with what they are of, whose id must stay its own

    def __call__(
        self,
        module: Any,
        query: Float[Tensor, "B H Q D"],
        key: Float[Tensor, "B G K D"],
        value: Float[Tensor, "B G K D"],
        attention_mask: Tensor | None,
        dropout: float | int = 0.0,  # a config may say 0
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **options: Any,
    ) -> tuple[Float[Tensor, "B Q H D"], None]:
        is_learned = position_bias is not None and position_bias.requires_grad
        gains = query.device.type == "cpu" and (can_draw(dropout) or (is_learned and not dropout))
        if not gains or key.size(1) != query.size(1) or options.get("softcap") is not None or "cache" in options:
            if position_bias is not None:
                options["position_bias"] = position_bias
            own = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
            return sdpa_attention_forward(module, query, key, value, attention_mask, **own, **options)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is None and causal and query.size(2) > 1:
            attention_mask = torch.ones(query.size(2), key.size(2), dtype=torch.bool).tril()
        mask = self._added(attention_mask)
        scale = query.size(-1) ** -0.5 if scaling is None else scaling
        out: Any = _Attention.apply(query, key, value, mask, position_bias, scale, dropout)
        return out.transpose(1, 2).contiguous(), None

    def _added(self, mask: Tensor | None) -> Tensor | None:
        """What is added to the scores: far below all others where nobody may look."""
        if mask is None or mask.dtype != torch.bool:
            return mask
        if id(mask) not in self._masks:
            added = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
            self._masks[id(mask)] = mask, added
        return self._masks[id(mask)][1]


class _Attention(torch.autograd.Function):
    """softmax(scale * q k' + mask + bias), dropped out, times v.

    Scores and softmax are in float32, the products with weights and their gradients in the type of what is given, as
    flash attention has it (Dao 2023, arXiv:2307.08691).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        scale: float,
        dropout: float | int,
    ) -> Tensor:
        shape, dtype = query.shape[:2], query.dtype
        exact = torch.promote_types(dtype, torch.float32)
        query, key, value = (part.contiguous().flatten(0, 1) for part in (query, key, value))
        with torch.autocast("cpu", enabled=False):
            scores = _Attention._scores(query.to(exact), key.to(exact), mask, bias, scale, shape)
            weights = scores.softmax(-1)
            noise = draw_noise(weights.shape, dropout, exact) if can_draw(dropout) else None
            out = torch.bmm((weights if noise is None else weights * noise).to(dtype), value)
        ctx.save_for_backward(query, key, value, weights, noise)
        ctx.scale, ctx.bias = scale, None if bias is None else (bias.shape, bias.dtype)
        return out.unflatten(0, shape)

    @staticmethod
    def _scores(
        query: Tensor, key: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, shape: torch.Size
    ) -> Tensor:
        turned = key.transpose(1, 2)
        parts = [part for part in (bias, mask) if part is not None]
        if not parts:
            return torch.bmm(query, turned).mul_(scale)
        added = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        whole = torch.empty(*shape, query.size(1), key.size(1), dtype=query.dtype).copy_(added)
        return whole.flatten(0, 1).baddbmm_(query, turned, alpha=scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, weights, noise = ctx.saved_tensors
        shape, out = outer[0].shape[:2], outer[0].contiguous().flatten(0, 1)
        with torch.autocast("cpu", enabled=False):
            of_weights = torch.bmm(out, value.transpose(1, 2)).to(weights.dtype)
            dropped = weights
            if noise is not None:
                dropped, of_weights = weights * noise, of_weights.mul_(noise)
            of_value = torch.bmm(dropped.to(out.dtype).transpose(1, 2), out)
            scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
            of_bias = None
            if ctx.needs_input_grad[4]:
                of_bias = scores.unflatten(0, shape).sum_to_size(ctx.bias[0]).to(ctx.bias[1])
            scores = scores.to(out.dtype)
            of_query, of_key = torch.bmm(scores, key), torch.bmm(scores.transpose(1, 2), query)
            if ctx.scale != 1:
                of_query, of_key = of_query.mul_(ctx.scale), of_key.mul_(ctx.scale)
        found = (gradient.unflatten(0, shape) for gradient in (of_query, of_key, of_value))
        return (*found, None, of_bias, None, None)
