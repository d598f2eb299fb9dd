"""Sums with gradients of their own, beside what autograd makes of the plain formulas in float64."""

from __future__ import annotations

import pytest
import torch

from distill_llm.core.word_sums import coarse_logits, mean_cross_entropy

N, V = 6, 11
IDS = torch.tensor([[3, 0, 10], [1, 2, 3], [5, 4, 9], [0, 1, 2], [10, 9, 8], [7, 3, 1]])


def _logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(N, V, generator=torch.Generator().manual_seed(1))).to(dtype)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coarse_logits_and_their_gradient(temperature: float, dtype: torch.dtype) -> None:
    logits = _logits(dtype).requires_grad_()
    found = coarse_logits(logits, IDS, temperature)
    exact = logits.detach().double().requires_grad_()
    others = torch.ones(N, V, dtype=torch.bool).scatter(1, IDS, False)
    rest = ((exact / temperature).exp() * others).sum(-1, keepdim=True).log()
    wanted = torch.cat([exact.gather(1, IDS) / temperature, rest], -1)
    torch.testing.assert_close(found, wanted.float(), atol=1e-5, rtol=1e-5)
    outer = torch.randn(N, 4, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(found, logits, outer, retain_graph=True)
    (again,) = torch.autograd.grad(found, logits, outer)
    assert torch.equal(gradient, again), "the diagnostics take a gradient before the step does"
    assert gradient.dtype == dtype
    (slopes,) = torch.autograd.grad(wanted, exact, outer.double())
    size = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(gradient.double(), slopes, atol=size, rtol=size)
    assert torch.equal(logits, _logits(dtype)), "the logits are left as they are"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_mean_cross_entropy_and_its_gradient(temperature: float) -> None:
    """A word that was drawn twice counts twice."""
    ids = IDS.clone()
    ids[0], ids[1, 1] = 3, 1
    logits = _logits().requires_grad_()
    found = mean_cross_entropy(logits, ids, temperature)
    exact = _logits().double().requires_grad_()
    wanted = -(exact / temperature).log_softmax(-1).gather(1, ids).mean(-1)
    torch.testing.assert_close(found, wanted.float(), atol=1e-5, rtol=1e-5)
    outer = torch.randn(N, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(found, logits, outer)
    (slopes,) = torch.autograd.grad(wanted, exact, outer.double())
    torch.testing.assert_close(gradient.double(), slopes, atol=1e-5, rtol=1e-5)
