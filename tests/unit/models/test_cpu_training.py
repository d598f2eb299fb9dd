"""Training on a CPU: cheap dropout against torch's, and attention against a formula in float64."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distill_llm.models import cpu_training
from distill_llm.models.cheap_dropout import CheapDropout, draw_noise
from distill_llm.models.cpu_training import quick_on_cpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill_llm.models.load import LoadedModel

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9], [9, 4, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "labels": torch.tensor([[6, 7, 1], [8, 1, -100]]),
}


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.93])
def test_as_many_are_dropped_as_by_torch(probability: float) -> None:
    ones, size = torch.ones(400_000), 400_000
    ours, torchs = CheapDropout(probability)(ones), nn.Dropout(probability)(ones)
    kept = 1 - probability
    noise = (probability * kept / size) ** 0.5
    assert abs(float((ours == 0).double().mean()) - probability) < 5 * noise
    for lane in range(4):  # four numbers are from one draw
        assert abs(float((ours[lane::4] == 0).double().mean()) - probability) < 5 * noise * 2
    assert float(ours.max()) == pytest.approx(float(torchs.max()), abs=1e-4 / kept**2)
    assert float(ours.mean()) == pytest.approx(float(torchs.mean()), abs=8 * noise / kept)
    assert float(ours.var()) == pytest.approx(float(torchs.var()), rel=0.02)


def test_entries_are_dropped_independently() -> None:
    """Of neighbours, of numbers from one draw, and of one mask and the next."""
    first, second = (draw_noise((400_000,), 0.5, torch.float32) - 1 for _ in range(2))
    limit = 5 / 400_000**0.5
    for lag in (1, 2, 3, 4, 5, 8):
        assert abs(float((first[:-lag] * first[lag:]).mean())) < limit * 1.01
    assert abs(float((first * second).mean())) < limit


def test_the_expectation_is_exact_at_the_resolution_of_the_bits() -> None:
    """0.1 is 6554 of 65536: what is left is scaled by that, not by 1 / 0.9."""
    noise = draw_noise((1000,), 0.1, torch.float64)
    assert set(noise.tolist()) == {0.0, 65536 / (65536 - 6554)}
    assert abs(6554 / 65536 - 0.1) < 1 / 65536


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (0, 4)])
def test_the_gradient_is_the_mask_over_what_is_left(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (1 + torch.rand(shape)).to(dtype).requires_grad_()
    torch.manual_seed(3)
    out = CheapDropout(0.4)(x)
    torch.manual_seed(3)
    noise = draw_noise(shape, 0.4, dtype)
    assert torch.equal(out, x * noise)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, noise)
    in_place = x.detach().clone()
    torch.manual_seed(3)
    assert CheapDropout(0.4, inplace=True)(in_place) is in_place
    assert torch.equal(in_place, out)


def test_a_seed_gives_the_same_masks_and_evaluation_none() -> None:
    x, layer = torch.ones(1000), CheapDropout(0.3)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    state = torch.get_rng_state()
    third = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(layer(x), third)
    assert layer.eval()(x) is x
    assert torch.equal(CheapDropout(0.0)(x), x)
    assert torch.equal(CheapDropout(1.0)(x), torch.zeros(1000))
    torch.testing.assert_close(CheapDropout(1e-7).train()(x), nn.Dropout(1e-7)(x), msg="below the resolution")


def _attention_mask(kind: str, queries: int, keys: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    allowed = torch.rand(2, 1, queries, keys) > 0.3
    allowed[..., 0] = True
    return allowed if kind == "bool" else torch.zeros(allowed.shape).masked_fill_(~allowed, -1e9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", ["learned", "fixed", "none"])
@pytest.mark.parametrize("masked", ["none", "bool", "float", "causal"])
def test_attention_is_that_of_the_formula(masked: str, bias: str, dropout: float, dtype: torch.dtype) -> None:
    """Against float64 and autograd, with the same dropout; the layer's own mask where there is none."""
    queries, keys = 5, 5 if masked == "causal" else 7
    given = [torch.randn(2, 3, size, 8).to(dtype).requires_grad_() for size in (queries, keys, keys)]
    position = torch.randn(1, 3, queries, keys, requires_grad=bias == "learned") if bias != "none" else None
    mask = _attention_mask("none" if masked == "causal" else masked, queries, keys)
    module = type("Layer", (), {"is_causal": masked == "causal"})()
    torch.manual_seed(7)
    attend = cpu_training._Attend()
    options: dict[str, Any] = {} if position is None else {"position_bias": position}
    out, _ = attend(module, *given, mask, dropout=dropout, scaling=0.7, **options)
    outer = torch.randn(out.shape).to(dtype)
    wanted = [*given, *([position] if bias == "learned" else [])]
    found = torch.autograd.grad(out, wanted, outer)

    torch.manual_seed(7)
    noise = draw_noise((6, queries, keys), dropout, torch.float32).view(2, 3, queries, keys) if dropout else 1.0
    exact = [part.detach().double().requires_grad_() for part in given]
    added = torch.zeros(1, 1, queries, keys, dtype=torch.float64)
    learned = None if position is None else position.detach().double().requires_grad_()
    scores = exact[0] @ exact[1].mT * 0.7 + (added if learned is None else learned)
    if masked == "causal":
        scores = scores.masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril(), -torch.inf)
    elif mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    expected = ((scores.softmax(-1) * noise) @ exact[2]).transpose(1, 2)
    ours = [out, *found]
    theirs = [expected, *torch.autograd.grad(expected, [*exact, *([learned] if bias == "learned" else [])], outer)]
    size = 1e-5 if dtype == torch.float32 else 4e-2
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, atol=size, rtol=size)


def test_layers_share_a_mask_and_not_that_of_another_batch() -> None:
    attend, mask = cpu_training._Attend(), torch.tensor([[True, False]])
    assert attend._added(mask) is attend._added(mask)
    for row in ([True, True], [False, True], [True, False]) * 5:  # ids of what is gone come again
        own = attend._added(torch.tensor([row]))
        assert own is not None
        assert ((own == 0) == torch.tensor([row])).all()


def _learned(model: Any, *, quick: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = copy.deepcopy(model).train()
    torch.manual_seed(11)
    if quick:
        with quick_on_cpu(model):
            loss = model(**BATCH).loss
            loss.backward()
    else:
        loss = model(**BATCH).loss
        loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def _same(
    one: tuple[torch.Tensor, dict[str, torch.Tensor]], other: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> None:
    torch.testing.assert_close(one[0], other[0], atol=1e-6, rtol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_a_t5_without_dropout_learns_the_same(tiny_t5: Callable[..., LoadedModel]) -> None:
    model = tiny_t5(num_layers=2).model
    _same(_learned(model, quick=True), _learned(model, quick=False))


def test_bfloat16_errs_no_more_than_torchs_attention(tiny_t5: Callable[..., LoadedModel]) -> None:
    """Of the gradients of six models, against float32."""

    def flat(found: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> torch.Tensor:
        return torch.cat([gradient.flatten() for gradient in found[1].values()])

    errors = {True: 0.0, False: 0.0}
    for seed in range(6):
        model = tiny_t5(num_layers=2, seed=seed).model
        exact = flat(_learned(model, quick=False))
        for quick in errors:
            with torch.autocast("cpu", torch.bfloat16):
                near = flat(_learned(model, quick=quick))
            errors[quick] += float((near - exact).norm() / exact.norm())
    assert 0.01 < errors[True] < 1.5 * errors[False]


def _llama() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, attention_dropout=0.3))


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_layers_that_are_computed_anew_draw_the_same(tiny_t5: Callable[..., LoadedModel], family: str) -> None:
    model = _llama() if family == "llama" else tiny_t5(num_layers=2, dropout_rate=0.3).model
    batch = {"input_ids": BATCH["input_ids"], "labels": BATCH["input_ids"]}
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable()
    found = []
    for one in (model, again):
        torch.manual_seed(11)
        with quick_on_cpu(one.train()):
            loss = one(**(batch if family == "llama" else BATCH)).loss
            loss.backward()
        weights = {name: weight.grad for name, weight in one.named_parameters() if weight.grad is not None}
        found.append((loss.detach(), weights))
    _same(*found)
    with quick_on_cpu(model):
        other = model(**(batch if family == "llama" else BATCH)).loss
    assert abs(float(other) - float(found[0][0])) > 1e-4, "dropout was drawn"


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_torch_draws_nothing_and_nothing_stays(
    tiny_t5: Callable[..., LoadedModel], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _llama() if family == "llama" else tiny_t5(dropout_rate=0.3).model
    kinds, names = [type(part) for part in model.modules()], list(model.state_dict())

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch was asked")

    batch = {"input_ids": BATCH["input_ids"], "labels": BATCH["input_ids"]} if family == "llama" else BATCH
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "dropout", refuse)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
        with quick_on_cpu(model.train()):
            model(**batch).loss.backward()
            assert list(model.state_dict()) == names
        with pytest.raises(AssertionError, match="torch was asked"):
            model(**batch)
    with pytest.raises(KeyError), quick_on_cpu(model):
        raise KeyError("a step fails")
    assert [type(part) for part in model.modules()] == kinds
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward


def test_grouped_keys_are_left_to_transformers(tiny_llama: Callable[..., LoadedModel]) -> None:
    """And evaluation, and a model that drops nothing."""
    model, ids = tiny_llama(num_hidden_layers=2).model, BATCH["input_ids"]
    expected = model(input_ids=ids).logits
    with quick_on_cpu(model):
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert torch.equal(model.train()(input_ids=ids).logits, expected)
