"""A model that is run beside the student, on the student's batches: what the tensor teachers with a model share.

M tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from distill_llm.core.features import LOGITS, Features, Reading, Shape, Side
from distill_llm.core.signals import Batch, LazySignals, Signals, signals_of, tokens_of
from distill_llm.models.forward import forward

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, device, nn

    from distill_llm.models.head import OutputHead


class ModelBeside:
    """Its signals carry no gradient, and lie on the batch's device wherever the model is.

    ``width``: words that it speaks of; None where its head has no more than its tokenizer.
    """

    whose = "teachers"

    def __init__(self, model: nn.Module, width: int | None = None):
        self._model: Any = model.eval().requires_grad_(False)
        self._width = width
        self._head: OutputHead | None = None

    def show(self, reading: Reading) -> Mapping[Side, Shape]:
        """Layers and width of each side of the model, whose attention gives its probabilities from now on if wanted."""
        from distill_llm.models.layers import shapes_of, show_attention

        show_attention(self._model, sorted(reading.attention), where=self.whose)
        return shapes_of(self._model)

    def signals(self, batch: Batch, reading: Reading = LOGITS) -> Signals:
        """What the model says of the supervised tokens, in row order."""
        import torch

        near = self._brought(batch)
        with torch.no_grad():
            passed = forward(self._model, near, reading)
            said = signals_of(passed.outputs.logits[..., : self._width], near, passed.at)
            features = passed.features(near, reading, {}) if reading else {}
        home = batch["labels"].device
        agreement = None if said.agreement is None else said.agreement.to(home)
        ids, targets = said.token_ids.to(home), said.targets.to(home)
        return Signals(said.logits.to(home), ids, targets, agreement, _brought_home(features, home))

    def lazy_signals(self, batch: Batch, reading: Reading = LOGITS) -> LazySignals:
        """The same, without logits yet."""
        import torch

        home = batch["labels"].device
        with torch.no_grad():
            said = self.head().read(self._model, self._brought(batch), reading)
            if home == self._device:
                return said
            return replace(
                said,
                tokens=tokens_of(batch),
                hidden=said.hidden.to(home),
                make_logits=partial(_made_elsewhere, said.make_logits, self._device),
                anchor=said.anchor.to(home),
                features=_brought_home(said.features, home),
            )

    def head(self) -> OutputHead:
        """The model's own, which makes its logits of hidden states."""
        from distill_llm.models.head import OutputHead

        if self._head is None:
            self._head = OutputHead(self._model, width=self._width, whose=self.whose)
        return self._head

    @property
    def model(self) -> nn.Module:
        return self._model

    @property
    def _device(self) -> device:
        return next(self._model.parameters()).device

    def _brought(self, batch: Batch) -> Batch:
        near = self._device
        found = {name: column.to(near) for name, column in batch.items()}
        if "pixel_values" in found:
            found["pixel_values"] = found["pixel_values"].to(self._model.dtype)
        return found


def _brought_home(features: Mapping[Side, Features], home: device) -> dict[Side, Features]:
    return {side: found.to(home) for side, found in features.items()}


def _made_elsewhere(
    make_logits: Callable[[Tensor], Tensor], where: device, hidden: Float[Tensor, "M D"]
) -> Float[Tensor, "M V"]:
    return make_logits(hidden.to(where)).to(hidden.device)
