"""Integer weights through torchao: as they are after training, and as training feels them before (fake quantization).

A quantized model is an ordinary Hugging Face one: torchao's tensors in safetensors, which ``from_pretrained`` reads
wherever torchao is installed. torchao is imported inside functions; recipes load without it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from distill_llm.core.component import Component
from distill_llm.core.errors import ConfigError
from distill_llm.core.extras import need

if TYPE_CHECKING:
    from torch import nn

    from distill_llm.models.spec import StudentSpec


class QuantizeSpec(Component):
    """What becomes of a model's weights: linear layers in integers, each group of weights with a scale of its own."""

    weights: Literal["int2", "int3", "int4", "int8"] = "int4"
    activations: Literal["full", "int8"] = Field(
        default="int8", description="int8: what a layer reads is rounded too, token by token, while it is read"
    )
    group_size: Annotated[int, Field(ge=2)] | Literal["row"] = Field(
        default=32,
        description="weights that share a scale; a divisor of each layer's width. row: all that make one output",
    )
    modules: tuple[str, ...] | Literal["all_linear"] = Field(
        default="all_linear", description="names of layers, or their ends; all_linear: every linear layer but the head"
    )
    head: bool = Field(default=False, description="the output head too, where it has weights of its own")
    embeddings: Literal["full", "int8"] = Field(
        default="full", description="int8: those of words, a scale for each; and the head, where it shares them"
    )

    def __str__(self) -> str:
        reads = ", activations int8" if self.activations == "int8" else ""
        group = "a row" if self.group_size == "row" else f"{self.group_size} weights"
        words = ", embeddings int8" if self.embeddings == "int8" else ""
        return f"weights {self.weights} (a scale for {group}){reads}{words}"


@dataclass(frozen=True, slots=True)
class Layers:
    """The parts of a model that are quantized, by name; ``words`` share one matrix."""

    linear: Mapping[str, nn.Module]
    words: Mapping[str, nn.Module] = field(default_factory=dict)


def find_layers(model: Any, spec: QuantizeSpec, *, where: str) -> Layers:
    """What ``spec`` quantizes of a model, whose weights may be without numbers.

    Raises ConfigError where that is nothing, where a group does not fit a layer, or where the head shares its weights
    with embeddings that stay full.
    """
    from torch import nn

    head, words = model.get_output_embeddings(), _words_of(model)
    tied = head is not None and any(head is part for part in words.values())
    if spec.head and tied and spec.embeddings == "full":
        raise ConfigError(
            f"{where}.head: the output head is the matrix of the embeddings. Set `embeddings: int8`, which quantizes "
            "both, or remove `head`."
        )
    parts: dict[str, nn.Module] = dict(model.named_modules())
    linear = {name: part for name, part in parts.items() if type(part) is nn.Linear and part is not head}
    if spec.modules != "all_linear":
        linear = _named(linear, spec.modules, where)
    if spec.head and not tied:
        if type(head) is not nn.Linear:
            raise ConfigError(f"{where}.head: that of {type(model).__name__} is no linear layer. Remove `head`.")
        linear |= {name: part for name, part in parts.items() if part is head}
    if not linear:
        raise ConfigError(
            f"{where}: {type(model).__name__} has no linear layer that could be quantized (those of GPT-2 are of "
            "another kind). Take another student."
        )
    _must_divide(linear, spec, where)
    if spec.embeddings == "full":
        return Layers(linear)
    odd = [name for name, part in words.items() if type(part) not in (nn.Embedding, nn.Linear)]
    if odd or not words:
        raise ConfigError(
            f"{where}.embeddings: those of {type(model).__name__} are no plain matrix ({', '.join(odd) or 'none'}). "
            "Set `embeddings: full`."
        )
    return Layers(linear, words)


def _words_of(model: Any) -> dict[str, Any]:
    """The modules that hold the matrix of the input's words, one of which may be the head."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is None:
        return {}
    return {name: part for name, part in model.named_modules() if getattr(part, "weight", None) is weight}


def _named(linear: Mapping[str, nn.Module], names: tuple[str, ...], where: str) -> dict[str, nn.Module]:
    def is_meant(name: str, wanted: str) -> bool:
        return name == wanted or name.endswith(f".{wanted}")

    unknown = [wanted for wanted in names if not any(is_meant(name, wanted) for name in linear)]
    if unknown or not names:
        ends = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ConfigError(f"{where}.modules: no linear layer's name ends with {unknown}. Expected some of {ends}.")
    return {name: part for name, part in linear.items() if any(is_meant(name, wanted) for wanted in names)}


def _must_divide(linear: Mapping[str, Any], spec: QuantizeSpec, where: str) -> None:
    if spec.group_size == "row":
        return
    size = spec.group_size
    wrong = {name: part.in_features for name, part in linear.items() if part.in_features % size}
    if not wrong:
        return
    widths = {part.in_features for part in linear.values()}
    fits = [number for number in (256, 128, 64, 32, 16, 8, 4, 2) if not any(width % number for width in widths)]
    name, width = next(iter(wrong.items()))
    raise ConfigError(
        f"{where}.group_size: {size} does not divide the width of {len(wrong)} layers, such as {width} of {name}. "
        f"Expected {', '.join(map(str, fits)) or 'another divisor of all widths'}, or `row`; or leave these layers out "
        "(`modules`)."
    )


def check_layers(student: StudentSpec, spec: QuantizeSpec, *, where: str) -> None:
    """Raises ConfigError where a student's layers cannot be quantized so; loads no weights."""
    from distill_llm.models.load import weightless_student
    from distill_llm.models.tokenizer import AnyWords

    check_torchao(where)
    find_layers(weightless_student(student, AnyWords()), spec, where=where)


def check_torchao(where: str) -> None:
    """Raises ConfigError where torchao is not installed."""
    need("torchao", "quantize", where=where)


def is_quantized(config: Any) -> bool:
    """Whether a model's config says that its weights are torchao's."""
    said = getattr(config, "quantization_config", None)
    method = said.get("quant_method") if isinstance(said, Mapping) else getattr(said, "quant_method", None)
    return method == "torchao"


def can_be_read(config: Any, *, where: str) -> bool:
    """Whether a model is quantized; raises ConfigError where it is, and what reads it is not installed."""
    if is_quantized(config):
        check_torchao(f"{where} (its weights are quantized)")
        return True
    return False


def quantized_bytes(model: Any, spec: QuantizeSpec, *, where: str) -> int:
    """Of the weights of a model (which may have no numbers) when it is quantized: one each, whatever their bits are,
    and five for each scale and its zero point. What stays full has four."""
    layers = find_layers(model, spec, where=where)
    size = sum(4 * weight.numel() for weight in model.parameters())
    words: list[Any] = list(layers.words.values())[:1]
    for part in [*layers.linear.values(), *words]:
        rows, width = part.weight.shape
        in_group = width if spec.group_size == "row" or part in words else spec.group_size
        size += rows * width - 4 * rows * width + 5 * rows * (width // in_group)
    return size


def must_learn(config: Any, *, where: str) -> None:
    """Raises ConfigError where a student's weights are integers, which no gradient moves."""
    if is_quantized(config):
        raise ConfigError(
            f"{where}: the weights of this model are quantized (torchao), and cannot be trained on. Name the model "
            "that it was made of (models/full_precision/model in a run of `scheme: {kind: quantization_aware}`)."
        )


def cast_quantized(model: Any, dtype: str) -> Any:
    """A quantized model that computes in another type; loading it in one leaves the scales in theirs, and fails."""
    import torch

    if dtype == "auto" or getattr(torch, dtype) == model.dtype:
        return model
    return model.to(getattr(torch, dtype))


def prepared(model: Any, spec: QuantizeSpec, *, where: str = "student") -> Any:
    """The model, whose layers now compute with rounded weights and learn the full ones; changed in place.

    Weights stay what they are, under their names: checkpoints, optimisers and ties do not notice. The gradient passes
    through the rounding as if it were not there (LLM-QAT, Liu et al. 2023, arXiv:2305.17888, sec. 2.1).
    """
    check_torchao(where)
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig, QATStep

    layers = find_layers(model, spec, where=where)
    for parts, base in ((layers.linear, _base(spec)), (layers.words, _base_of_words())):
        if parts:
            quantize_(model, QATConfig(base, step=QATStep.PREPARE), filter_fn=_is_one_of(parts))
    return model


def is_prepared(model: Any) -> bool:
    return any(_fakes(model))


@contextmanager
def as_quantized(model: Any) -> Iterator[None]:
    """While it lasts, a prepared model computes with rounded weights, whatever ``fake`` said."""
    fakes = list(_fakes(model))
    before = [one.enabled for one in fakes]
    fake(model, True)
    try:
        yield
    finally:
        for one, enabled in zip(fakes, before, strict=True):
            one.enabled = enabled


def fake(model: Any, enabled: bool) -> None:
    """Whether a prepared model rounds."""
    for one in _fakes(model):
        one.enabled = enabled


def _fakes(model: Any) -> Iterator[Any]:
    for module in model.modules():
        for name in ("weight_fake_quantizer", "activation_fake_quantizer"):
            if getattr(module, name, None) is not None:
                yield getattr(module, name)


def quantized(model: Any, spec: QuantizeSpec, *, where: str = "student") -> Any:
    """The model with integer weights, changed in place; a prepared one, or one that was never trained for it.

    A prepared model says the same before and after.
    """
    check_torchao(where)
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig, QATStep

    if is_prepared(model):
        quantize_(
            model, QATConfig(step=QATStep.CONVERT), filter_fn=lambda part, _: hasattr(part, "weight_fake_quantizer")
        )
    layers = find_layers(model, spec, where=where)
    quantize_(model, _base(spec), filter_fn=_is_one_of(layers.linear))
    if layers.words:
        first, *others = layers.words.values()
        quantize_(model, _base_of_words(), filter_fn=_is_one_of({"": first}))
        for part in others:
            part.weight = first.weight
    _declare(model, spec, layers)
    return model


def save_quantized(model: Any, folder: str | Path) -> None:
    """Writes a model that ``quantized`` gave as a Hugging Face folder, without a tokenizer."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    def state_of(model: Any) -> Any:
        # A quantized matrix that several parts share is written once: of two copies, transformers cannot tell that they
        # are equal, and fails when it loads them. torchao's list of names knows none without a dot (BART's bias).
        tied = model.all_tied_weights_keys
        state = {name: one for name, one in model.state_dict().items() if name not in tied}
        tensors, facts = flatten_tensor_state_dict({name: one for name, one in state.items() if "." in name})
        return tensors | {name: one for name, one in state.items() if "." not in name}, facts

    model.hf_quantizer.get_state_dict_and_metadata = state_of
    try:
        model.save_pretrained(str(folder))
    finally:
        del model.hf_quantizer.get_state_dict_and_metadata


def _is_one_of(parts: Mapping[str, Any]) -> Any:
    known = {id(part) for part in parts.values()}
    return lambda part, _: id(part) in known


def _base(spec: QuantizeSpec) -> Any:
    """torchao's own description of ``spec``, but for the embeddings."""
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerAxis, PerGroup

    group = PerAxis(0) if spec.group_size == "row" else PerGroup(spec.group_size)
    dtype = getattr(torch, spec.weights)
    if spec.activations == "full":
        return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=group)
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=group)


def _base_of_words() -> Any:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis

    return IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))


def _declare(model: Any, spec: QuantizeSpec, layers: Layers) -> None:
    """Tells transformers, so that it saves the model as what it is, and says so in its config."""
    from torch import nn
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    quant_type = _base(spec)
    if layers.words:
        from torchao.quantization import FqnToConfig

        of: Any = [(name, quant_type) for name in layers.linear] + [(name, _base_of_words()) for name in layers.words]
        quant_type = FqnToConfig(OrderedDict(of))
    taken = {*layers.linear, *layers.words}
    left = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name not in taken]
    said = TorchAoConfig(quant_type, modules_to_not_convert=left, include_input_output_embeddings=bool(layers.words))
    model.config.quantization_config = said
    model.hf_quantizer = AutoHfQuantizer.from_config(said, pre_quantized=True)
