"""Attention of many rows to one prefix that they share: its keys and values are there once, not once a row.

Each step of generation is bound by reading keys and values; with a few-shot prompt nearly all of them are the prefix's.
The same sums as those of a cache that repeats it (Juravsky et al. 2024, arXiv:2402.05099, sec. 3). Imports torch and
transformers at the top: import it inside functions.

B rows, H heads, K key heads, Q new positions, P positions of the prefix, S of the rest, D size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

Layer = tuple[Float[Tensor, "1 K P D"], Float[Tensor, "1 K P D"]]

_NAME = "distill_llm_shared_prefix"
_prefix: ContextVar[Sequence[Layer]] = ContextVar("prefix")


class _RestLayer(DynamicLayer):
    """Keys and values behind a prefix that lies elsewhere; its length counts the prefix."""

    def __init__(self, prefix: int):
        super().__init__()
        self._prefix = prefix

    def get_seq_length(self) -> int:
        """Positions of the prefix and of the rest."""
        return self._prefix + super().get_seq_length()


def rest_cache(layers: Sequence[Layer]) -> DynamicCache:
    """An empty cache for what follows the prefix in ``layers``; for use within ``sharing``."""
    cache = DynamicCache()
    cache.layers[:] = [_RestLayer(keys.size(2)) for keys, _ in layers]
    cache.layer_class_to_replicate = None
    return cache


@contextmanager
def sharing(model: Any, layers: Sequence[Layer]) -> Iterator[None]:
    """Within it, ``model`` attends to the prefix in ``layers``, and to what the cache holds behind it."""
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    config = model.config.get_text_config(decoder=True)
    before, token = config._attn_implementation, _prefix.set(layers)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _prefix.reset(token)


def _attend(
    module: Any,
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B K S D"],
    value: Float[Tensor, "B K S D"],
    attention_mask: Float[Tensor, "B 1 Q P+S"],
    scaling: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "B Q H D"], None]:
    """One layer, in the form that transformers asks for."""
    prefix_key, prefix_value = _prefix.get()[module.layer_idx]
    rows, heads, queries, size = query.shape
    if queries > 1:  # the prompts themselves, once a batch: for this layer alone the prefix is repeated
        key = torch.cat([prefix_key.expand(rows, -1, -1, -1), key], dim=2)
        value = torch.cat([prefix_value.expand(rows, -1, -1, -1), value], dim=2)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    key_heads, length = key.size(1), prefix_key.size(2)
    scale = size**-0.5 if scaling is None else scaling
    grouped = query.reshape(rows, key_heads, heads // key_heads, size) * scale
    together = grouped.transpose(0, 1).reshape(key_heads, -1, size)  # the rows stand beside each other: one product
    to_prefix = (together @ prefix_key[0].transpose(1, 2)).view(key_heads, rows, -1, length).transpose(0, 1)
    to_rest = grouped @ key.transpose(2, 3) + attention_mask[..., length:]
    weights = torch.cat([to_prefix, to_rest], dim=-1).softmax(-1, dtype=torch.float32).to(query.dtype)
    of_prefix = weights[..., :length].transpose(0, 1).reshape(key_heads, -1, length) @ prefix_value[0]
    out = of_prefix.view(key_heads, rows, -1, size).transpose(0, 1) + weights[..., length:] @ value
    return out.reshape(rows, 1, heads, size), None
