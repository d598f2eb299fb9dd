"""Attention that keeps what a GPU's kernels keep: queries, keys, values and the output, and no weights.

For dry runs on a machine without the GPU. B rows, H heads, T positions, D size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

_SDPA = "sdpa"


@contextmanager
def attention_as_on_a_gpu(wanted: bool = True) -> Iterator[None]:
    """While it lasts, `sdpa` attention of transformers gives tensors of the right shape, and takes what a GPU takes."""
    if not wanted:
        yield
        return
    before = AttentionInterface()[_SDPA]
    AttentionInterface.register(_SDPA, _attend)
    try:
        yield
    finally:
        AttentionInterface.register(_SDPA, before)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    del module, attention_mask
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out: Any = _Attention.apply(query, key, value, options.get("position_bias"))
    return out.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, bias, out, torch.empty_like(query[..., 0], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        del outer
        query, key, value, bias, _, _ = ctx.saved_tensors
        learned = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[3] else None
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), learned
