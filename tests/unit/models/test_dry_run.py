"""Bytes and arithmetic that are counted without numbers, beside those worked out by hand and those of a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distill_llm.models.dry_run import dry, saved_for_backward
from distill_llm.recipe.train import TrainSpec
from distill_llm.training.arguments import make_optimizer

ROWS, WIDE, OUT = 10, 64, 32


def test_a_layer_by_hand() -> None:
    """Weights, what is kept of relu(x W'), the product's operations; and what is there afterwards."""
    with dry() as run:
        layer = nn.Linear(WIDE, OUT, bias=False)
        run.mark_model(layer, "weights")
        assert run.live["weights"] == 4 * WIDE * OUT
        given = torch.randn(ROWS, WIDE)
        run.restart()
        with saved_for_backward(run):
            out = layer(given).relu().sum()
        assert run.flops == 2 * ROWS * WIDE * OUT
        assert run.live["activations"] == 4 * ROWS * (WIDE + OUT)
        out.backward()
        assert run.flops == 2 * (2 * ROWS * WIDE * OUT)  # the input needs no gradient
        assert run.peak.total() >= 4 * (WIDE * OUT + ROWS * (WIDE + OUT))
        del given, out
        layer.zero_grad()
        assert run.live.total() == 4 * WIDE * OUT


@pytest.mark.parametrize(("optimizer", "numbers"), [("adamw", 2 * WIDE * OUT), ("adafactor", WIDE + OUT)])
def test_states_of_optimisers(optimizer: Any, numbers: int) -> None:
    """8 bytes a weight of AdamW; of Adafactor a mean for each row and column."""
    with dry() as run:
        layer = nn.Linear(WIDE, OUT, bias=False)
        made = make_optimizer(layer, TrainSpec(max_steps=1, optimizer=optimizer))
        layer.weight.grad = torch.zeros_like(layer.weight)
        run.mark_model(layer, "weights")
        run.mark(layer.weight.grad, "gradients")
        made.step()
        left = run.live.total() - run.live["weights"] - run.live["gradients"]
    assert 0 <= left - 4 * numbers <= 16  # a norm that Adafactor keeps


def test_logits_are_told_apart(tiny_t5: Any) -> None:
    with dry() as run:
        model = _like(tiny_t5(seed=1).model)
        run.mark_model(model, "weights")
        words = model.get_output_embeddings().weight.size(0)
        ids = torch.ones(3, 5, dtype=torch.long)
        run.restart()
        kept = model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits
        assert tuple(kept.shape) == (3, 5, words)
        assert run.peak["logits"] == 4 * 3 * 5 * words


def test_a_whole_pass_keeps_what_a_real_one_keeps(tiny_t5: Any) -> None:
    """Storages that autograd keeps of a T5's forward pass, each once, weights and whole numbers aside."""
    model = tiny_t5(seed=1).model.train()
    ids = torch.randint(1, 9, (4, 7))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids, "use_cache": False}
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its place would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(**given).logits.float().logsumexp(-1).sum()
    with dry() as run:
        other = _like(model).train()
        run.mark_model(other, "weights")
        run.restart()
        with saved_for_backward(run):
            same = other(**given).logits.float().logsumexp(-1).sum()
        counted = run.live["activations"] + run.live["logits"]
    assert out.shape == same.shape
    assert counted == pytest.approx(sum(kept.values()), rel=0.02)


def test_a_number_that_is_asked_for() -> None:
    with dry():
        tensor = torch.randn(4, 4)
        assert tensor.sum().item() == 1
        assert bool((tensor > 0).all())
        whole = torch.arange(4)
        assert whole.tolist() == [0, 1, 2, 3]


def test_nothing_is_left_of_it() -> None:
    """Models have numbers again, and can be moved."""
    with dry():
        pass
    layer = nn.Linear(2, 2).to(torch.float64)
    assert layer.weight.dtype == torch.float64
    assert bool(layer(torch.zeros(1, 2, dtype=torch.float64)).isfinite().all())


def _like(model: Any) -> Any:
    return type(model)(model.config)
