"""A model that also speaks after fewer of its decoder's layers, and that can be cut down to them.

N tokens, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill_llm.core.errors import ConfigError
from distill_llm.core.features import Reading
from distill_llm.core.signals import Batch
from distill_llm.models.forward import forward
from distill_llm.models.head import OutputHead
from distill_llm.models.layers import without_heads
from distill_llm.models.spec import StudentSpec

_NORMS = ("final_layer_norm", "norm", "ln_f", "final_norm", "layer_norm")
"""Names of what stands between a decoder's last layer and its head."""
_OF_DECODER = ("num_decoder_layers", "decoder_layers")
_OF_STACK = ("num_hidden_layers", "num_layers", *_OF_DECODER)


def config_of(spec: StudentSpec) -> Any:
    """The config of a student that was checked, before its vocabulary is known; loads no weights."""
    from transformers import CONFIG_MAPPING

    from distill_llm.models.load import student_config

    if not spec.config:
        return student_config(spec)
    sizes: dict[str, Any] = {key: value for key, value in spec.config.items() if key != "model_type"}
    return CONFIG_MAPPING[str(spec.config["model_type"])](**sizes)


def decoder_depth(config: Any) -> int:
    """Layers of the decoder; a decoder-only model is all decoder."""
    if config.is_encoder_decoder:
        return next(getattr(config, name) for name in _OF_DECODER if hasattr(config, name))
    return config.get_text_config().num_hidden_layers


class Exits:
    """What a model makes of its decoder's states after some layer: the last layer's norm and head, shared by all.

    Raises ConfigError where it is not known how the model's decoder ends, or what it does there.
    """

    def __init__(self, model: Any):
        self._model = _inner(model)
        self._stack, self._layers = _layers_of(self._model)
        norms = (getattr(self._stack, name, None) for name in _NORMS)
        self._norm = next((norm for norm in norms if isinstance(norm, nn.Module)), nn.Identity())
        # T5 alone drops out behind its last norm, and scales what its head reads.
        self._is_t5 = hasattr(self._stack, "block")
        config = self._model.config
        scales = self._is_t5 and getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
        self._scale = config.d_model**-0.5 if scales else 1.0

    def read(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """What the head reads, of states after some layer."""
        states = self._norm.forward(states)  # not a call: FSDP's hooks would take the weights away again
        if self._is_t5:
            states = self._stack.dropout(states)
        return states * self._scale if self._scale != 1.0 else states

    def check(self, model: Any, exits: Sequence[int]) -> None:
        """Raises ConfigError where an exit does not say what the model says that is cut down to it."""
        one = torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        ids = torch.cat([one, one * 2, one * 3], 1)
        batch: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = ids
        was_training, head = model.training, OutputHead(model)
        model.eval()
        with torch.no_grad():
            hidden = forward(model, batch, Reading(hidden=frozenset({"decoder"}))).hidden("decoder")
            for layers in exits:
                said = head.logits(self.read(hidden[layers][0]))
                with cut_to(model, layers):
                    expected = forward(model, batch).outputs.logits[0]
                if not torch.allclose(said, expected, rtol=1e-3, atol=1e-4):
                    gap = (said - expected).abs().max().item()
                    raise ConfigError(
                        f"scheme.exits: {type(self._model).__name__} does something between its decoder's last layer "
                        f"and its head that is not known (logits after layer {layers} are {gap:.2g} apart). Use a T5, "
                        "a Llama or another model of their kind."
                    )
        model.train(was_training)


def _inner(model: Any) -> Any:
    from accelerate.utils import extract_model_from_parallel

    inner: Any = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    return inner.get_base_model() if hasattr(inner, "peft_config") else inner


def _layers_of(model: Any) -> tuple[Any, str]:
    """A model's decoder, and the name under which it has its layers. Raises ConfigError where that is not known."""
    stack, depth = model.get_decoder(), decoder_depth(model.config)
    if stack is not None:
        for name, part in stack.named_children():
            if isinstance(part, nn.ModuleList) and len(part) == depth:
                return stack, name
    raise ConfigError(
        f"scheme.exits: where {type(model).__name__} has the {depth} layers of its decoder is not known. Use a T5, a "
        "Llama or another model of their kind."
    )


@contextmanager
def cut_to(model: Any, layers: int) -> Iterator[None]:
    """While it lasts, the model has the first ``layers`` of its decoder alone, and a config that says so."""
    inner = _inner(model)
    stack, name = _layers_of(inner)
    whole = getattr(stack, name)
    changes = list(_config_changes(inner.config, stack.config, len(whole), layers))
    before = [(config, key, getattr(config, key)) for config, key, _ in changes]
    setattr(stack, name, whole[:layers])
    for config, key, value in changes:
        setattr(config, key, value)
    try:
        yield
    finally:
        setattr(stack, name, whole)
        for config, key, value in before:
            setattr(config, key, value)


def _config_changes(config: Any, of_stack: Any, depth: int, layers: int) -> Iterator[tuple[Any, str, Any]]:
    """Settings (config, key, value) with which a decoder of ``depth`` layers has ``layers``."""
    for one in [config] if of_stack is config else [config, of_stack]:
        is_whole = one is config and config.is_encoder_decoder
        for key in _OF_DECODER if is_whole else _OF_STACK:
            if getattr(one, key, None) == depth:
                yield one, key, layers
        if not is_whole and getattr(one, "layer_types", None):
            yield one, "layer_types", list(one.layer_types[:layers])


def save_merged(model: Any, folder: Path) -> None:
    """A model that is cut, as a Hugging Face folder of its own. Adapters are merged into what is left of their base,
    for no model of that depth lies anywhere."""
    if hasattr(model, "peft_config"):
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(str(folder), state_dict=without_heads(model.state_dict()))
