"""What a model is made of: which axis of each weight counts hidden states, heads or neurons, and in which layer it is.

Known by the names that transformers gives to weights. What a family's rules do not name is not cut, but refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from distill_llm.core.errors import ConfigError

Stack: TypeAlias = str
"""``encoder`` or ``decoder``; a decoder-only model is all decoder."""
HIDDEN = "hidden"
"""The space of the model's width, which all layers share."""

Unit = Literal["hidden", "neurons", "heads", "groups"]
"""What is counted along an axis. Groups are key-value heads, each with the query heads that read it."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a weight. Axes of one ``space`` keep the same units; each unit is ``width`` numbers."""

    unit: Unit
    space: str
    width: int = 1


@dataclass(frozen=True, slots=True)
class Weight:
    """``axes``: None where an axis stays as it is. ``layer``: None for what belongs to no layer."""

    name: str
    axes: tuple[Axis | None, ...]
    stack: Stack
    layer: int | None = None

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def writes(self) -> str:
        """The space of what a matrix reads where it writes to the hidden states, as the last one of a layer does."""
        if len(self.axes) != 2 or self.axes[0] is None or self.axes[1] is None:
            return ""
        return self.axes[1].space if self.axes[0].space == HIDDEN else ""

    @property
    def is_norm(self) -> bool:
        return len(self.axes) == 1 and self.axes[0] is not None and self.axes[0].unit == HIDDEN and "norm" in self.name


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many of each a model has; ``layers`` of each stack, of which a decoder-only model has one."""

    layers: Mapping[Stack, int]
    heads: int
    groups: int
    neurons: int
    hidden: int

    def of(self, unit: Unit) -> int:
        return getattr(self, unit)

    def __str__(self) -> str:
        layers = " + ".join(str(number) for number in self.layers.values())
        groups = f" ({self.groups} for keys and values)" if self.groups != self.heads else ""
        return f"{layers} layers, {self.heads} heads{groups}, {self.neurons} neurons, hidden {self.hidden}"


@dataclass(frozen=True, slots=True)
class Family:
    """Models whose weights have the same names.

    ``rules``: a weight's name within its layer, and a letter for each axis: h hidden, n neurons of the layer, q query
    heads, k key-value heads, s heads that all layers of a stack share, b the same with one number each, c heads of the
    cross-attention, and a dot for an axis that stays; ``outside``: of weights in no layer, by their whole names.
    ``keeps_hidden``: types whose width cannot be cut; ``splits_hidden``: whose width is a multiple of its heads.
    """

    types: tuple[str, ...]
    layers: Mapping[Stack, str]
    sizes: Mapping[Unit, str]
    head_width: str
    layer: re.Pattern[str]
    rules: tuple[tuple[str, str], ...]
    outside: tuple[tuple[str, str], ...]
    keeps_hidden: tuple[str, ...] = ()
    splits_hidden: tuple[str, ...] = ()

    def sizes_of(self, config: Any) -> Sizes:
        counts = {unit: int(getattr(config, key)) for unit, key in self.sizes.items()}
        return Sizes({stack: int(getattr(config, key)) for stack, key in self.layers.items()}, **counts)

    def head_numbers(self, config: Any) -> int:
        given = getattr(config, self.head_width, None)
        return int(given or getattr(config, self.sizes["hidden"]) // getattr(config, self.sizes["heads"]))

    def block(self, stack: Stack, layer: int) -> str:
        """The name of a layer's module."""
        return f"{stack}.block.{layer}" if len(self.layers) > 1 else f"model.layers.{layer}"


_T5 = Family(
    types=("t5", "mt5"),
    layers={"encoder": "num_layers", "decoder": "num_decoder_layers"},
    sizes={"hidden": "d_model", "neurons": "d_ff", "heads": "num_heads", "groups": "num_heads"},
    head_width="d_kv",
    layer=re.compile(r"(?P<stack>encoder|decoder)\.block\.(?P<layer>\d+)\.(?P<rest>.+)"),
    rules=(
        (r"layer\.0\.SelfAttention\.[qkv]\.weight", "sh"),
        (r"layer\.0\.SelfAttention\.o\.weight", "hs"),
        (r"layer\.1\.EncDecAttention\.[qkv]\.weight", "ch"),
        (r"layer\.1\.EncDecAttention\.o\.weight", "hc"),
        (r"layer\.\d\.DenseReluDense\.wi(_[01])?\.weight", "nh"),
        (r"layer\.\d\.DenseReluDense\.wo\.weight", "hn"),
        (r"layer\.\d\.layer_norm\.weight", "h"),
    ),
    outside=(
        (r"(shared|encoder\.embed_tokens|decoder\.embed_tokens|lm_head)\.weight", ".h"),
        # The first layer of a stack makes it for all of them, whichever layer that is.
        (r"(encoder|decoder)\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight", ".b"),
        (r"(encoder|decoder)\.final_layer_norm\.weight", "h"),
    ),
)
_LLAMA = Family(
    types=("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"),
    layers={"decoder": "num_hidden_layers"},
    sizes={
        "hidden": "hidden_size",
        "neurons": "intermediate_size",
        "heads": "num_attention_heads",
        "groups": "num_key_value_heads",
    },
    head_width="head_dim",
    layer=re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<rest>.+)"),
    rules=(
        (r"self_attn\.q_proj\.weight", "qh"),
        (r"self_attn\.q_proj\.bias", "q"),
        (r"self_attn\.[kv]_proj\.weight", "kh"),
        (r"self_attn\.[kv]_proj\.bias", "k"),
        (r"self_attn\.o_proj\.weight", "hq"),
        (r"self_attn\.[qk]_norm\.weight", "."),
        (r"mlp\.(gate|up)_proj\.weight", "nh"),
        (r"mlp\.(gate|up)_proj\.bias", "n"),
        (r"mlp\.down_proj\.weight", "hn"),
        (r"(self_attn\.o_proj|mlp\.down_proj)\.bias", "h"),
        (r"(input|post_attention|pre_feedforward|post_feedforward)_layernorm\.weight", "h"),
    ),
    outside=((r"(model\.embed_tokens|lm_head)\.weight", ".h"), (r"model\.norm\.weight", "h")),
    keeps_hidden=("gemma", "gemma2"),
    splits_hidden=("llama",),
)
_FAMILIES = (_T5, _LLAMA)


def family_of(config: Any, where: str) -> Family:
    """Raises ConfigError where the weights of such a model are not known."""
    for family in _FAMILIES:
        if config.model_type in family.types:
            return family
    known = ", ".join(kind for family in _FAMILIES for kind in family.types)
    raise ConfigError(
        f"{where}: what a model of the type '{config.model_type}' is made of is not known, so that it cannot be cut. "
        f"Expected one of {known}."
    )


def weights_in(model: Any, where: str) -> list[Weight]:
    """Each weight of a model, a shared one once. Raises ConfigError where one is not what its name says."""
    family = family_of(model.config, where)
    sizes, width = family.sizes_of(model.config), family.head_numbers(model.config)
    found = []
    for name, tensor in model.named_parameters():
        weight = _weight(family, name, width)
        shape = weight and [
            size if axis is None else axis.width * sizes.of(axis.unit)
            for size, axis in zip(tensor.shape, weight.axes, strict=False)
        ]
        if weight is None or shape != list(tensor.shape):
            raise ConfigError(
                f"{where}: {type(model).__name__} has a weight {name} of the shape {list(tensor.shape)}, which is not "
                f"known{f' (expected {shape})' if shape else ''}, so that it cannot be cut."
            )
        found.append(weight)
    return found


def _weight(family: Family, name: str, width: int) -> Weight | None:
    for rule, letters in family.outside:
        if re.fullmatch(rule, name):
            stack: Stack = "encoder" if name.startswith("encoder") else "decoder"
            return Weight(name, tuple(_axes(letters, stack, 0, width)), stack)
    found = family.layer.fullmatch(name)
    if found is None:
        return None
    inside: Stack = "encoder" if found.groupdict().get("stack") == "encoder" else "decoder"
    layer = int(found["layer"])
    for rule, letters in family.rules:
        if re.fullmatch(rule, found["rest"]):
            return Weight(name, tuple(_axes(letters, inside, layer, width)), inside, layer)
    return None


def _axes(letters: str, stack: Stack, layer: int, width: int) -> Iterator[Axis | None]:
    known = {
        "h": Axis("hidden", HIDDEN),
        "n": Axis("neurons", f"{stack}.{layer}.neurons"),
        "q": Axis("heads", f"{stack}.{layer}.heads", width),
        "k": Axis("groups", f"{stack}.{layer}.groups", width),
        "s": Axis("heads", f"{stack}.heads", width),
        "b": Axis("heads", f"{stack}.heads"),
        "c": Axis("heads", f"{stack}.{layer}.cross", width),
    }
    for letter in letters:
        yield known.get(letter)
