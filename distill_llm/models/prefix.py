"""The beginning that all prompts share, read by a decoder-only model once.

P positions of the prefix.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MIN_TOKENS = 16  # below this, reading it again costs less than keeping it

# Attention that is softmax(query key / scale) value and nothing else, through transformers' attention interface.
_PLAIN_ATTENTION = (
    "gemma",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
)
_ROPES = ("default", "linear", "llama3", "yarn")  # their angles do not depend on how long the text is
_OWN_MASKS = ("gpt_neo",)  # local attention that counts places, which the gap behind the prefix shifts


def common_prefix(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The longest beginning of all prompts that leaves each at least one token."""
    sizes = [len(prompt) for prompt in prompts]
    if not sizes:
        return ()
    columns = zip(*(prompt[: min(sizes) - 1] for prompt in prompts), strict=True)
    return tuple(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def has_plain_cache(model: Any) -> bool:
    """Whether keys and values of a text stay as they are, whatever follows it: then they can be kept and copied.

    Known to be so for decoders with full attention in all layers whose positions are given from outside. Sliding
    windows, recurrent states, ALiBi and angles that depend on the length are left to the plain way.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    base = _base(model)
    config = base.config.get_text_config(decoder=True)
    inputs = inspect.signature(base.forward).parameters
    if base.config.is_encoder_decoder or not {"position_ids", "past_key_values"} <= set(inputs):
        return False
    if getattr(base, "_is_stateful", False) or getattr(config, "alibi", False) or config.model_type in _OWN_MASKS:
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in _ROPES or any(isinstance(part, dict) for part in rope.values()):
        return False
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def can_share_prefix(model: Any) -> bool:
    """Whether a prefix can lie beside the cache, once for all rows; where not, each batch gets copies of it."""
    config = _base(model).config
    return has_plain_attention(config) and config.get_text_config()._attn_implementation in ("sdpa", "eager")


def has_plain_attention(config: Any) -> bool:
    """Whether a model is a decoder of a family whose attention is known to be the plain one."""
    return config.get_text_config().model_type in _PLAIN_ATTENTION


class SharedPrefix:
    """Keys and values of ``tokens``, one row of them, which no batch changes; for models with a plain cache."""

    def __init__(self, model: Any, tokens: tuple[int, ...]):
        import torch
        from transformers import DynamicCache

        self.tokens, self._model, self._beside = tokens, _base(model), can_share_prefix(model)
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        model(input_ids=torch.tensor([tokens], device=model.device), past_key_values=cache)
        self._layers: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore

    def begins(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Whether each prompt is these tokens and more."""
        size = len(self.tokens)
        return all(len(prompt) > size and tuple(prompt[:size]) == self.tokens for prompt in prompts)

    def cache(self, rows: int) -> Any:
        """A cache of its own for a batch of so many rows, to be used within ``attended``."""
        if self._beside:
            from distill_llm.models.prefix_attention import rest_cache

            return rest_cache(self._layers)
        from transformers import DynamicCache

        rows_of_all = [tuple(part.expand(rows, -1, -1, -1) for part in layer) for layer in self._layers]
        return DynamicCache(rows_of_all)  # which copies: the first thing that a layer does is to append to nothing

    def attended(self) -> AbstractContextManager[None]:
        """Within it the model sees the prefix, wherever it lies."""
        if not self._beside:
            return nullcontext()
        from distill_llm.models.prefix_attention import sharing

        return sharing(self._model, self._layers)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
