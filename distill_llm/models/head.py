"""A model's output head, applied to supervised tokens alone, a chunk at a time: no [B, T, V] and no [N, V] is made.

B rows, T positions, N supervised tokens, M of them, V vocabulary, D hidden size, K terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill_llm.core.errors import ConfigError
from distill_llm.core.features import LOGITS, Reading
from distill_llm.core.signals import Batch, LazySignals, Signals, tokens_of
from distill_llm.models.forward import forward
from distill_llm.models.layers import heads_of
from distill_llm.models.stored_head import StoredHead, finish_of, take_head

AUTO_BYTES = 128 * 2**20
"""Of the float32 logits of one chunk. A loss keeps about ten tensors of that size while it works."""

_INSTEAD = "Set `train.chunk_tokens: 0`, which makes all logits at once."


@dataclass(slots=True)
class _Caught:
    """What went through the head in one forward pass."""

    hidden: Tensor | None = None
    logits: Tensor | None = None
    calls: int = 0
    autocast: tuple[str, torch.dtype, bool] = ("cpu", torch.bfloat16, False)


class OutputHead:
    """The head of a Hugging Face model, with all that the model does to its logits.

    ``width``: words that are kept; None for all. ``chunk_tokens``: tokens whose logits exist at once.
    """

    def __init__(
        self,
        model: Any,
        *,
        chunk_tokens: int | Literal["auto"] = "auto",
        width: int | None = None,
        whose: str = "student",
    ):
        from accelerate.utils import extract_model_from_parallel

        inner: Any = extract_model_from_parallel(model, keep_fp32_wrapper=True)
        self._model = inner.get_base_model() if hasattr(inner, "peft_config") else inner
        self._where = f"{whose}: {type(self._model).__name__}"
        self._module = self._model.get_output_embeddings()
        if self._module is None:
            raise ConfigError(f"{self._where} names no output head. {_INSTEAD}")
        self._chunk_tokens: int | Literal["auto"] = chunk_tokens
        self._width, self._whose = width, whose
        self._checked = False
        self._others: dict[int, OutputHead] = {}

    def beside(self, model: Any) -> OutputHead:
        """That of another model that learns in the same training; made once."""
        if model.get_output_embeddings() is self._module:
            return self
        if id(model) not in self._others:
            head = OutputHead(model, chunk_tokens=self._chunk_tokens, width=self._width, whose=self._whose)
            self._others[id(model)] = head
        return self._others[id(model)]

    def logits(self, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
        """Of hidden states, as the model would make them outside of autocast."""
        return self._finished(self._module.forward(hidden))[..., : self._width]

    def read(self, model: Any, batch: Batch, reading: Reading = LOGITS) -> LazySignals:
        """One forward pass, of which ``reading`` is wanted too.

        ``model`` is called as it is wrapped, or a gradient's reduction over ranks is skipped.

        The head gets one token (twice), which keeps the graph of all ranks alike; the rest waits for the loss. Raises
        ConfigError where the model's logits are not what this class would make of them.
        """
        tokens = tokens_of(batch)
        with self._catching() as caught:
            passed = forward(model, batch, reading)
        logits = passed.outputs.logits
        self._check(caught, logits, passed.shape)
        assert caught.hidden is not None
        weights = self._gathered(model)
        return LazySignals(
            tokens=tokens,
            hidden=passed.at(caught.hidden, tokens.rows, tokens.columns),
            make_logits=partial(self._logits, caught.autocast),
            weights=tuple(weight for weight in weights if weight.requires_grad),
            anchor=logits[:, :0].float().sum(),
            chunk_tokens=self._tokens_at_once(logits.size(-1)),
            features=passed.features(batch, reading, heads_of(model)) if reading else {},
        )

    def stored(self) -> StoredHead:
        """The head alone, for use without the model; a ConfigError where that cannot be."""
        width = self._width or self._module.weight.size(0)
        return take_head(self._model, width, where=self._where)

    def _tokens_at_once(self, words: int) -> int:
        return max(1, AUTO_BYTES // (4 * words)) if isinstance(self._chunk_tokens, str) else self._chunk_tokens

    @contextmanager
    def _catching(self) -> Iterator[_Caught]:
        """Keeps the hidden states that the head should have got, and gives it one of them instead, twice."""
        caught = _Caught()

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not inputs:
                return None
            hidden = inputs[0]
            caught.hidden, caught.calls = hidden, caught.calls + 1
            kind = hidden.device.type
            caught.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
            one = hidden[:1, :1]
            # A hundred times as loud for the check: a cap on logits that we know nothing of would be heard. Two tokens
            # in every pass, or dropout on a head would draw other numbers after a resume, which checks again.
            return torch.cat([one, one if self._checked else 100 * one], 1), *inputs[1:]

        def after(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            caught.logits = output

        hooks = [self._module.register_forward_pre_hook(before), self._module.register_forward_hook(after)]
        try:
            yield caught
        finally:
            for hook in hooks:
                hook.remove()

    def _check(self, caught: _Caught, logits: Tensor, shape: tuple[int, int]) -> None:
        """Once for each model: are its logits what we would make of the head's?"""
        if self._checked:
            return
        if caught.calls != 1 or caught.hidden is None or caught.logits is None or caught.hidden.shape[:2] != shape:
            raise ConfigError(
                f"{self._where} uses its output head in an unknown way ({caught.calls} calls in a forward pass; "
                f"expected one, with hidden states of {shape} tokens). {_INSTEAD}"
            )
        with torch.no_grad(), _autocast(caught.autocast):
            expected = self._finished(caught.logits).float()
        if expected.shape != logits.shape or not torch.allclose(
            expected, logits.float(), rtol=1e-2, atol=1e-4, equal_nan=True
        ):
            raise ConfigError(
                f"{self._where} changes the logits of its output head in a way that is not known (known are caps, "
                f"scales and a bias). {_INSTEAD}"
            )
        self._checked = True

    def _logits(self, autocast: tuple[str, torch.dtype, bool], hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
        # ``forward``, not a call: FSDP's hooks would take the weights away again in the middle of the loss.
        with _autocast(autocast):
            return self._finished(self._module.forward(hidden))[..., : self._width]

    def _finished(self, logits: Tensor) -> Tensor:
        return finish_of(self._model)(logits)

    def _gathered(self, model: nn.Module) -> list[Tensor]:
        """The head's weights, whole: FSDP may have taken them apart at the end of the forward pass."""
        weights = list(self._module.parameters())
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from torch.distributed.fsdp import FSDPModule
            from torch.distributed.tensor import DTensor

            if any(isinstance(weight, DTensor) for weight in weights):
                holders = [part for part in model.modules() if isinstance(part, FSDPModule)]
                holder = [part for part in holders if any(own is self._module for own in part.modules())][-1]  # type: ignore
                holder.unshard()
                weights = list(self._module.parameters())
        if any(weight.numel() == 0 for weight in weights):
            raise ConfigError(f"{self._where}: its output head's weights are shared among processes. {_INSTEAD}")
        return weights


def _autocast(state: tuple[str, torch.dtype, bool]) -> AbstractContextManager[Any]:
    """As it was in the forward pass; entered anew each time, or it would keep casts of weights that have changed."""
    kind, dtype, enabled = state
    return torch.autocast(kind, dtype=dtype, enabled=enabled)


LossOf = Callable[[Signals, int], tuple[Float[Tensor, ""], Float[Tensor, " K"]]]
"""A chunk's part of the loss and of each term's mean; the chunk comes with its number."""


def summed_in_chunks(
    signals: LazySignals, chunks: Sequence[tuple[int, int]], loss_of: LossOf, num_terms: int
) -> tuple[Float[Tensor, ""], Float[Tensor, " K"]]:
    """The loss, summed over chunks (first token, last token + 1), and the means of the terms without a gradient.

    Each chunk's gradient is taken at once, while its logits are there: nothing is computed a second time in the
    backward pass, and what is kept for it is one gradient of the hidden states and one of the head.
    """
    task = _Task(signals, chunks, loss_of, num_terms)
    if not torch.is_grad_enabled():
        return task.summed(signals.hidden, [False] * (1 + len(signals.weights)))[:2]
    total, means = _InChunks.apply(task, signals.hidden, *signals.weights)  # type: ignore[misc]
    return total + signals.anchor, means


@dataclass(frozen=True, slots=True)
class _Task:
    signals: LazySignals
    chunks: Sequence[tuple[int, int]]
    loss_of: LossOf
    num_terms: int

    def summed(self, hidden: Tensor, needed: Sequence[bool]) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Loss, means, and the gradients that are needed: of the hidden states, then of each of the head's weights."""
        total = hidden.new_zeros((), dtype=torch.float32)
        means = hidden.new_zeros(self.num_terms, dtype=torch.float32)
        sums: list[Tensor | None] = [torch.zeros_like(hidden) if needed[0] else None]
        sums += [None] * len(self.signals.weights)
        for number, (start, stop) in enumerate(self.chunks):
            gradients = self._add_chunk(number, hidden[start:stop], needed, total, means)
            for index, gradient in enumerate(gradients):
                if gradient is None:
                    continue
                if index == 0:
                    sums[0][start:stop] = gradient  # type: ignore[index]
                else:
                    sums[index] = _added(sums[index], gradient, whole=len(self.chunks) == 1)
        return total, means, sums

    def _add_chunk(
        self, number: int, hidden: Tensor, needed: Sequence[bool], total: Tensor, means: Tensor
    ) -> list[Tensor | None]:
        hidden = hidden.detach().requires_grad_(needed[0])
        with torch.set_grad_enabled(any(needed)):
            loss, part = self.loss_of(self.signals.said(*self.chunks[number], hidden), number)
        total += loss.detach()
        means += part
        inputs = [hidden, *self.signals.weights]
        wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ())
        return [next(found) if need else None for need in needed]


def _added(total: Tensor | None, gradient: Tensor, *, whole: bool) -> Tensor:
    """In float32, which a sum of many small gradients needs; in place, because they are large."""
    if total is None:
        return gradient if whole else gradient.float()
    return total.add_(gradient)


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, task: _Task, hidden: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        total, means, sums = task.summed(hidden, ctx.needs_input_grad[1:])
        ctx.gradients = [
            None if found is None else found.to(tensor.dtype)
            for found, tensor in zip(sums, (hidden, *weights), strict=True)
        ]
        ctx.mark_non_differentiable(means)
        return total, means

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Given away, not kept: the head's gradient is as large as the head, and a second holder would mean a copy.
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "a loss in chunks goes backward once"
        return (None, *(None if gradient is None else gradient.mul_(outer[0]) for gradient in gradients))
