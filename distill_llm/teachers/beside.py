"""A model that is run beside the student, on the student's batches: what the tensor teachers with a model share.

M tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

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

    def signals(self, batch: Batch) -> Signals:
        """What the model says of the supervised tokens, in row order."""
        import torch

        near = self._brought(batch)
        with torch.no_grad():
            passed = forward(self._model, near)
            said = signals_of(passed.outputs.logits[..., : self._width], near, passed.at)
        home = batch["labels"].device
        agreement = None if said.agreement is None else said.agreement.to(home)
        return Signals(said.logits.to(home), said.token_ids.to(home), said.targets.to(home), agreement)

    def lazy_signals(self, batch: Batch) -> LazySignals:
        """The same, without logits yet."""
        import torch

        from distill_llm.models.head import OutputHead

        if self._head is None:
            self._head = OutputHead(self._model, width=self._width, whose=self.whose)
        home = batch["labels"].device
        with torch.no_grad():
            said = self._head.read(self._model, self._brought(batch))
            if home == self._device:
                return said
            return replace(
                said,
                tokens=tokens_of(batch),
                hidden=said.hidden.to(home),
                make_logits=partial(_made_elsewhere, said.make_logits, self._device),
                anchor=said.anchor.to(home),
            )

    @property
    def _device(self) -> device:
        return next(self._model.parameters()).device

    def _brought(self, batch: Batch) -> Batch:
        near = self._device
        return {name: column.to(near) for name, column in batch.items()}


def _made_elsewhere(
    make_logits: Callable[[Tensor], Tensor], where: device, hidden: Float[Tensor, "M D"]
) -> Float[Tensor, "M V"]:
    return make_logits(hidden.to(where)).to(hidden.device)
