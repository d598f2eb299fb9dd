"""An encoder-decoder's two stacks, run part by part within one call of the model.

n rows of a part, w its width, S places of all parts in a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

_INSTEAD = "Set `train.packing: never`, which pads all rows of a batch to the longest."


@contextmanager
def running_in_parts(
    model: Any, encoders: Sequence[Int[Tensor, "n w"]], decoders: Sequence[Int[Tensor, "n w"]], reads: Sequence[Tensor]
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """While it lasts, the model's encoder and decoder run on parts of the batch that they get (``core/layout.py``).

    What they give back is [1, S, D], one part behind the other. The wrapped model is called once, as wrappers that
    reduce gradients over processes need it; that its stacks run several times is their own affair. Where layers fetch
    their weights from other processes, all have to run them equally often: then each stack runs once, and pads. Yields
    the parts of encoder and decoder as they are run.
    """
    from accelerate.utils import extract_model_from_parallel

    inner: Any = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    inner = inner.get_base_model() if hasattr(inner, "peft_config") else inner
    encoder, decoder = inner.get_encoder(), inner.get_decoder()
    if is_sharded(encoder) or is_sharded(decoder):
        # What the decoder reads are places among those of the encoder's parts, which move.
        moved = _moved(encoders)
        encoders, decoders = [_merged(encoders)], [_merged(decoders)]
        reads = [merged.where(merged < 0, moved[merged.clamp_min(0)]) for merged in [_merged(reads)]]
    stacks = _Stacks(type(inner).__name__, encoder.forward, decoder.forward, encoders, decoders, reads)
    encoder.forward, decoder.forward = stacks.encode, stacks.decode
    try:
        yield encoders, decoders
    finally:
        del encoder.forward, decoder.forward


def is_sharded(stack: Any) -> bool:
    """Whether layers of a model fetch their weights when they are called (FSDP, DeepSpeed's third stage)."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    sharded = (FSDPModule, FullyShardedDataParallel)
    return any(isinstance(part, sharded) for part in stack.modules()) or any(
        hasattr(weight, "ds_id") for weight in stack.parameters()
    )


def _merged(parts: Sequence[Int[Tensor, "n w"]]) -> Int[Tensor, "n w"]:
    """One part of all rows, padded to the widest."""
    import torch
    from torch.nn.functional import pad

    width = max(part.size(1) for part in parts)
    return torch.cat([pad(part, (0, width - part.size(1)), value=-1) for part in parts])


def _moved(parts: Sequence[Int[Tensor, "n w"]]) -> Int[Tensor, " S"]:
    """Where each place among those of all parts goes when they are merged."""
    import torch

    width, rows, found = max(part.size(1) for part in parts), 0, []
    for part in parts:
        places = torch.arange(len(part) * width, device=part.device).view(len(part), width)
        found.append((rows * width + places[:, : part.size(1)]).flatten())
        rows += len(part)
    return torch.cat(found)


class _Stacks:
    """What stands in for the two stacks' own ``forward``."""

    def __init__(
        self,
        name: str,
        encoder: Any,
        decoder: Any,
        encoders: Sequence[Tensor],
        decoders: Sequence[Tensor],
        reads: Sequence[Tensor],
    ):
        self._name, self._encoder, self._decoder = name, encoder, decoder
        self._encoders, self._decoders, self._reads = encoders, decoders, reads

    def encode(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any) -> Any:
        tokens = self._given(input_ids, "encoder").flatten()
        said = [
            self._encoder(input_ids=tokens[places.clamp_min(0)], attention_mask=(places >= 0).long(), **options)
            for places in self._encoders
        ]
        return _one_behind_the_other(said)

    def decode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Float[Tensor, "1 S D"] | None = None,
        encoder_attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        from torch.nn.functional import embedding

        tokens = self._given(input_ids, "decoder").flatten()
        states = self._given(encoder_hidden_states, "decoder")[0]
        said = [
            self._decoder(
                input_ids=tokens[places.clamp_min(0)],
                # An embedding's gradient is added up faster than an index's, and several rows may read one state.
                encoder_hidden_states=embedding(sources.clamp_min(0), states),
                encoder_attention_mask=(sources >= 0).long(),
                **options,
            )
            for places, sources in zip(self._decoders, self._reads, strict=True)
        ]
        return _one_behind_the_other(said)

    def _given(self, tensor: Tensor | None, stack: str) -> Tensor:
        if tensor is None:
            raise ConfigError(f"{self._name} calls its {stack} in a way that is not known. {_INSTEAD}")
        return tensor


def _one_behind_the_other(said: Sequence[Any]) -> Any:
    import torch

    def joined(states: Sequence[Tensor]) -> Float[Tensor, "1 S D"]:
        return torch.cat([part.flatten(0, 1) for part in states])[None]

    found: dict[str, Any] = {"last_hidden_state": joined([one.last_hidden_state for one in said])}
    if said[0].get("hidden_states") is not None:
        layers = zip(*(one.hidden_states for one in said), strict=True)
        found["hidden_states"] = tuple(joined(layer) for layer in layers)
    return type(said[0])(**found)
