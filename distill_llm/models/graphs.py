"""A model cut into the graphs that another runtime runs: one that reads, and one that writes a token.

Keys and values go in and come out as arrays, so that a loop of a few lines writes a text with them.
B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distill_llm.core.errors import ExportError
from distill_llm.models.prefix import has_plain_cache
from distill_llm.models.vision import is_vision, picture_shape

if TYPE_CHECKING:
    from transformers import DynamicCache

_ROWS, _READ, _WRITTEN = 2, 7, 3  # of the sample that is traced; a size of 1 would be taken for a constant


@dataclass(frozen=True, slots=True)
class Graph:
    """A module, inputs to trace it with, and which of their axes are free."""

    module: nn.Module
    inputs: dict[str, Any]
    free: dict[str, Any]


class Encoder(nn.Module):
    """Reads an input, and gives the keys and values that each layer of the decoder looks at: "cross"."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> dict[str, Any]:
        # What the decoder makes of its start token is dropped from the graph, because nothing asks for it.
        first = next(iter(inputs.values()))
        start = torch.full((first.size(0), 1), self.model.config.decoder_start_token_id)
        out = self.model(**inputs, decoder_input_ids=start, use_cache=True)
        return {"cross": _spread(out.past_key_values.cross_attention_cache)}


class Decoder(nn.Module):
    """Goes on with tokens behind "past" and beside "cross": the logits [B, V] of the last one, and "present"."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, cross: dict[str, Any], past: dict[str, Any], attention_mask: Tensor | None = None
    ) -> dict[str, Any]:
        from transformers import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        cache = EncoderDecoderCache(_gathered(past), _gathered(cross))
        cache.is_updated = dict.fromkeys(range(len(cross)), True)
        # Its states are in `cross` already: only their number is looked at.
        keys = cross["0"]["key"]
        states = torch.zeros(1, 1, 1).expand(keys.size(0), keys.size(2), _width(self.model.config))
        masked = {} if attention_mask is None else {"attention_mask": attention_mask}
        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),  # type: ignore[arg-type]
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
            **masked,
        )
        return {"logits": out.logits[:, -1], "present": _spread(out.past_key_values.self_attention_cache)}


class DecoderOnly(nn.Module):
    """Goes on with tokens behind "past", which may be empty: the logits [B, V] of the last one, and "present"."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: dict[str, Any]
    ) -> dict[str, Any]:
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=_gathered(past),
            use_cache=True,
            logits_to_keep=1,
        )
        return {"logits": out.logits[:, -1], "present": _spread(out.past_key_values)}


def why_no_graphs(model: Any) -> str:
    """Why a model, which may have no weights yet, cannot be cut into graphs; "" where it can."""
    if model.config.is_encoder_decoder or has_plain_cache(model):
        return ""
    return (
        f"a {model.config.model_type} keeps more of what it has read than plain keys and values (a sliding window, a "
        "recurrent state, or positions that depend on the length)"
    )


@torch.no_grad()
def graphs_of(model: Any) -> dict[str, Graph]:
    """ "encoder" and "decoder", or "decoder" alone, of a model in eval mode on a CPU.

    Raises ExportError where what the model keeps is not plain keys and values.
    """
    return _of_two(model) if model.config.is_encoder_decoder else _of_one(model)


def past_shapes(graphs: Mapping[str, Graph]) -> list[tuple[int, int]]:
    """Heads and their size in each layer of the decoder's past."""
    past = graphs["decoder"].inputs["past"]
    return [(layer["key"].size(1), layer["key"].size(3)) for layer in past.values()]


def _of_two(model: Any) -> dict[str, Graph]:
    if is_vision(model.config):
        weight = next(model.parameters())
        read: dict[str, Tensor] = {"pixel_values": torch.zeros(_ROWS, *picture_shape(model.config), dtype=weight.dtype)}
        free: dict[str, Any] = {"pixel_values": _axes(0)}
    else:
        mask = torch.ones(_ROWS, _READ, dtype=torch.long)
        mask[1, 4:] = 0
        read = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
        free = {name: _axes(0, 1) for name in read}
    begun = torch.ones(_ROWS, _WRITTEN, dtype=torch.long)
    cache = model(**read, decoder_input_ids=begun, use_cache=True).past_key_values
    cross, past = (_plain(getattr(cache, f"{kind}_attention_cache", None), model) for kind in ("cross", "self"))
    inputs = {"input_ids": begun[:, :2].clone(), "cross": cross, "past": past}
    shapes = {"input_ids": _axes(0, 1), "cross": _free_cache(cross), "past": _free_cache(past)}
    if "attention_mask" in read:
        inputs["attention_mask"], shapes["attention_mask"] = read["attention_mask"], _axes(0, 1)
    return {"encoder": Graph(Encoder(model), dict(read), free), "decoder": Graph(Decoder(model), inputs, shapes)}


def _of_one(model: Any) -> dict[str, Graph]:
    ids = torch.ones(_ROWS, _READ, dtype=torch.long)
    past = _plain(model(input_ids=ids, use_cache=True).past_key_values, model)
    mask = torch.ones(_ROWS, _READ + _WRITTEN, dtype=torch.long)
    mask[1, :2] = 0
    positions = torch.arange(_READ, _READ + _WRITTEN).repeat(_ROWS, 1)
    inputs = {"input_ids": ids[:, :_WRITTEN].clone(), "attention_mask": mask, "position_ids": positions, "past": past}
    free = {name: _axes(0, 1) for name in inputs if name != "past"} | {"past": _free_cache(past)}
    return {"decoder": Graph(DecoderOnly(model), inputs, free)}


def _plain(cache: Any, model: Any) -> dict[str, dict[str, Tensor]]:
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", None)
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        raise ExportError(
            f"a {model.config.model_type} keeps what it has read in a {type(cache).__name__} that is not plain keys "
            "and values of each layer: it cannot be cut into graphs. Export it as safetensors."
        )
    return _spread(cache)


def _spread(cache: Any) -> dict[str, dict[str, Tensor]]:
    return {str(number): {"key": layer.keys, "value": layer.values} for number, layer in enumerate(cache.layers)}


def _gathered(layers: dict[str, Any]) -> DynamicCache:
    from transformers import DynamicCache

    cache = DynamicCache()
    for number, layer in enumerate(layers.values()):
        cache.update(layer["key"], layer["value"], number)
    return cache


def _free_cache(layers: Mapping[str, Any]) -> dict[str, Any]:
    return {number: {part: _axes(0, 2) for part in layer} for number, layer in layers.items()}


def _axes(*axes: int) -> dict[int, Any]:
    return dict.fromkeys(axes, torch.export.Dim.AUTO)


def _width(config: Any) -> int:
    """Of what the encoder gives."""
    return config.encoder.hidden_size if is_vision(config) else config.hidden_size
