"""The output head in chunks: where it stands, what is refused, and what it leaves behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaForCausalLM

from distill_llm.core.errors import ConfigError
from distill_llm.core.signals import model_inputs, signals_of, tokens_of
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.models.head import AUTO_BYTES, OutputHead

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill_llm.core.signals import Batch, LazySignals, Signals
    from distill_llm.models.load import LoadedModel

ROWS = [
    Row(0, "rationale_then_label", [5], [9, 10, 11, 1], agreement=0.25),
    Row(1, "label", [5, 6, 7], [8, 1], agreement=0.5),
    Row(2, "rationale_then_label", [5, 6], [12, 1], agreement=0.75),
    Row(3, "label", [6], [7, 1], agreement=1.0),
]


def _batch(model: Any, rows: list[Row] = ROWS) -> Batch:
    return Collator(0, 0 if model.config.is_encoder_decoder else None)(rows)


def _all_of(signals: LazySignals) -> Signals:
    return signals.said(0, len(signals.tokens.token_ids), signals.hidden)


def test_tokens_lie_by_target_and_in_row_order_with_the_logits_that_predict_them(
    tiny_model: Callable[..., LoadedModel],
) -> None:
    model = tiny_model(seed=1).model
    batch = _batch(model)
    whole = signals_of(model(**model_inputs(batch)).logits, batch)
    order = [index for target in (0, 2) for index, found in enumerate(whole.targets.tolist()) if found == target]
    lazy = OutputHead(model).read(model, batch)
    assert lazy.tokens.spans == {0: (0, 4), 2: (4, 10)}
    for start, stop in ((0, 10), (3, 6), (9, 10)):
        said, picked = lazy.said(start, stop, lazy.hidden[start:stop]), order[start:stop]
        torch.testing.assert_close(said.logits, whole.logits[picked])
        assert said.token_ids.tolist() == whole.token_ids[picked].tolist()
        assert said.targets.tolist() == whole.targets[picked].tolist()
        assert said.agreement is not None
        assert whole.agreement is not None
        assert said.agreement.tolist() == whole.agreement[picked].tolist()
    torch.testing.assert_close(lazy.of_target(2).part(1, 3).logits, whole.logits[order[5:7]])


def test_a_batch_without_supervised_tokens_has_none(tiny_llama: Callable[..., LoadedModel]) -> None:
    """A decoder's first token is predicted by nothing."""
    batch = _batch(tiny_llama().model, [Row(0, "label", [], [1])])
    assert tokens_of(batch).spans == {}
    assert tokens_of(batch).token_ids.tolist() == []


def test_the_model_is_afterwards_as_it_was(tiny_model: Callable[..., LoadedModel]) -> None:
    """Also where its forward pass fails."""
    model = tiny_model(seed=1).model
    batch = _batch(model)
    before = model(**model_inputs(batch)).logits
    head = OutputHead(model)
    head.read(model, batch)
    torch.testing.assert_close(model(**model_inputs(batch)).logits, before, rtol=0, atol=0)
    with pytest.raises((TypeError, ValueError)):
        head.read(model, batch | {"unheard_of": 1, "input_ids": None})
    assert model(**model_inputs(batch)).logits.shape == before.shape


def test_the_wrapped_model_is_called(tiny_llama: Callable[..., LoadedModel]) -> None:
    """The inner one would skip what the wrapper does with gradients."""
    model, calls = tiny_llama(seed=1).model, []

    class Wrapper(torch.nn.parallel.DistributedDataParallel):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.module = model

        def forward(self, **inputs: Any) -> Any:
            calls.append(inputs)
            return self.module(**inputs)

    wrapped = Wrapper()
    OutputHead(wrapped).read(wrapped, _batch(model))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("words", "asked", "expected"), [(151_936, "auto", 220), (32_128, "auto", 1044), (512, 7, 7), (10**9, "auto", 1)]
)
def test_auto_fills_its_bytes(
    tiny_llama: Callable[..., LoadedModel], words: int, asked: Any, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(seed=1).model
    monkeypatch.setattr(torch.Tensor, "size", _size_as_if(model.config.vocab_size, words))
    found = OutputHead(model, chunk_tokens=asked).read(model, _batch(model)).chunk_tokens
    assert found == expected
    assert asked != "auto" or words > AUTO_BYTES or found * words * 4 <= AUTO_BYTES < (found + 1) * words * 4


def _size_as_if(real: int, words: int) -> Any:
    """``Tensor.size`` that tells another vocabulary: a head of that size would fill the tests' memory."""
    size = torch.Tensor.size

    def told(tensor: torch.Tensor, *dimension: int) -> Any:
        found = size(tensor, *dimension)
        return words if dimension == (-1,) and found == real and tensor.dim() == 3 else found

    return told


class Doubling(LlamaForCausalLM):
    """Logits change behind the head."""

    def forward(self, *arguments: Any, **inputs: Any) -> Any:
        outputs = super().forward(*arguments, **inputs)
        outputs.logits = self.changed(outputs.logits)
        return outputs

    def changed(self, logits: torch.Tensor) -> torch.Tensor:
        return logits * 2


class Capping(Doubling):
    """A cap far above the logits of a fresh model, under a name of its own."""

    def changed(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.tanh(logits / 10) * 10


class Cutting(Doubling):
    """Fewer words than the head has."""

    def changed(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[..., :-1]


class Twice(LlamaForCausalLM):
    """The head is used for two things."""

    def forward(self, *arguments: Any, **inputs: Any) -> Any:
        super().forward(*arguments, **inputs)
        return super().forward(*arguments, **inputs)


class Never(LlamaForCausalLM):
    """The head's weights are used, the head is not."""

    def forward(self, *arguments: Any, **inputs: Any) -> Any:
        outputs = self.model(*arguments, **inputs)
        outputs.logits = torch.nn.functional.linear(outputs.last_hidden_state, self.lm_head.weight)
        return outputs


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Doubling, "student: Doubling changes the logits of its output head in a way that is not known"),
        (Capping, "student: Capping changes the logits"),
        (Cutting, "student: Cutting changes the logits"),
        (Twice, r"student: Twice uses its output head in an unknown way \(2 calls"),
        (Never, r"student: Never uses its output head in an unknown way \(0 calls"),
    ],
)
def test_a_head_that_is_not_understood_is_refused(
    tiny_llama: Callable[..., LoadedModel], kind: type[LlamaForCausalLM], message: str
) -> None:
    """Before a loss is made of it, with the way out."""
    torch.manual_seed(0)
    model = kind(tiny_llama().model.config)
    with pytest.raises(ConfigError, match=rf"{message}.*train\.chunk_tokens: 0"):
        OutputHead(model).read(model, _batch(model))


def test_a_model_without_a_head_is_refused(tiny_llama: Callable[..., LoadedModel]) -> None:
    with pytest.raises(ConfigError, match=r"teachers: frozen: LlamaModel names no output head.*chunk_tokens: 0"):
        OutputHead(tiny_llama().model.model, whose="teachers: frozen")


def test_a_loss_in_chunks_goes_backward_once(tiny_llama: Callable[..., LoadedModel]) -> None:
    """Its gradients are given away, not kept."""
    from distill_llm.models.head import summed_in_chunks

    model = tiny_llama(seed=1).model
    signals = OutputHead(model).read(model, _batch(model))
    total, means = summed_in_chunks(signals, [(0, 4)], lambda said, number: (said.logits.sum(), torch.ones(2)), 2)
    torch.testing.assert_close(total, _all_of(signals).logits[:4].sum())
    assert means.tolist() == [1.0, 1.0]
    assert not means.requires_grad
    (3 * total).backward(retain_graph=True)
    (expected,) = torch.autograd.grad(3 * _all_of(signals).logits[:4].sum(), model.lm_head.weight, retain_graph=True)
    torch.testing.assert_close(model.lm_head.weight.grad, expected)
    with pytest.raises(AssertionError, match="goes backward once"):
        total.backward()
