"""A model's output head without the model: its weights, and what the model does to its logits.

M tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import ConfigError, StorageError
from distill_llm.core.files import atomic

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Finish:
    """What models do behind their head. T5's scale is in front of it."""

    scale: float | None = None
    divisor: float | None = None
    cap: float | None = None
    bias: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        import torch

        if self.scale is not None:
            logits = logits * self.scale
        if self.divisor is not None:
            logits = logits / self.divisor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits if self.bias is None else logits + self.bias.to(logits.device)


def finish_of(model: Any) -> Finish:
    """That of a Hugging Face model."""
    config = model.config.get_text_config(decoder=True)
    return Finish(
        scale=getattr(model, "logit_scale", None),  # Cohere
        divisor=getattr(config, "logits_scaling", None),  # Granite
        cap=getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None),  # Gemma
        bias=getattr(model, "final_logits_bias", None),  # BART
    )


@dataclass(frozen=True, slots=True)
class StoredHead:
    """Makes logits of hidden states as the model did that it was taken from, over as many words as were kept."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None
    finish: Finish

    def __call__(self, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
        import torch
        from torch.nn.functional import linear

        with torch.autocast(hidden.device.type, enabled=False):  # the teacher was not run under it either
            return self.finish(linear(hidden.to(self.weight.dtype), self.weight, self.bias))

    def save(self, path: Path) -> None:
        """Writes a safetensors file, whole or not at all; the numbers of ``finish`` stand in its metadata."""
        from safetensors.torch import save_file

        tensors = {"weight": self.weight, "bias": self.bias, "finish_bias": self.finish.bias}
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
        numbers = {name: getattr(self.finish, name) for name in ("scale", "divisor", "cap")}
        with atomic(path) as draft:
            save_file(kept, draft, {name: repr(float(one)) for name, one in numbers.items() if one is not None})


def load_head(path: Path, device: str) -> StoredHead:
    """What ``save`` wrote. Raises StorageError where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=device) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            numbers = {name: float(one) for name, one in (file.metadata() or {}).items() if name != "format"}
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{path}: the teacher's head cannot be read ({error}). Delete the file and type: distill-llm cache-signals "
            "RECIPE. Rows that are there are not computed again."
        ) from None
    finish = Finish(**numbers, bias=tensors.get("finish_bias"))
    return StoredHead(tensors["weight"], tensors.get("bias"), finish)


def take_head(model: Any, width: int, *, where: str) -> StoredHead:
    """The head of a Hugging Face model, cut to its first ``width`` words.

    Raises ConfigError where it is no plain matrix: adapters and quantized weights would need more than that.
    """
    from torch import nn

    module = model.get_output_embeddings()
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        raise ConfigError(
            f"{where}: its output head is a {type(module).__name__}, and only a plain linear layer can be kept in a "
            "cache, of full weights. Take `payload: {kind: top_k}`, or `load_in: full`."
        )
    finish = finish_of(model)
    bias = None if finish.bias is None else finish.bias[..., :width]
    own = None if module.bias is None else module.bias[:width]
    return StoredHead(module.weight[:width], own, Finish(finish.scale, finish.divisor, finish.cap, bias))
