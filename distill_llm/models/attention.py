"""How a model's attention is computed, where versions of transformers and torch leave something out.

B rows, H heads, T positions, D size of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

NAME = "flex_attention"


def set_attention(model: Any, name: str) -> None:
    """Sets the attention of a Hugging Face model and of its two stacks; its errors are ValueError and ImportError.

    A T5's stacks have copies of the model's config, which transformers 5.17 leaves as they were.
    """
    from transformers import PreTrainedModel

    model.set_attn_implementation(name)
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or type(part.config) is not type(model.config):
            continue
        if part.config._attn_implementation != name:
            part.set_attn_implementation(name)


def prepare_flex(model: Any, *, where: str) -> None:
    """Lets transformers' flex attention compute in what autocast says; a ConfigError where it cannot train ``model``.

    Rotated queries and keys are float32 there and values bfloat16. ``scaled_dot_product_attention`` is cast by
    autocast, flash attention by transformers, flex attention by nobody: torch refuses the three.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    dropout = getattr(model.config.get_text_config(decoder=True), "attention_dropout", 0.0) or 0.0
    if dropout:
        raise ConfigError(
            f"{where}.attention: flex_attention knows no dropout, and {type(model).__name__} has attention_dropout "
            f"{dropout:g}. Set student.config.attention_dropout to 0, or remove `attention`."
        )
    own = ALL_ATTENTION_FUNCTIONS[NAME]
    if not getattr(own, "casts", False):
        ALL_ATTENTION_FUNCTIONS.register(NAME, _casting(own))


def _casting(attention: Any) -> Any:
    def cast(
        module: Any,
        query: Float[Tensor, "B H T D"],
        key: Float[Tensor, "B H T D"],
        value: Float[Tensor, "B H T D"],
        *arguments: Any,
        **options: Any,
    ) -> Any:
        import torch

        kind = query.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return attention(module, query, key, value, *arguments, **options)

    cast.casts = True  # type: ignore[attr-defined]
    return cast
