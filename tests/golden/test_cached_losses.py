"""Losses beside a teacher of whose words some were kept, against formulas word by word in float64.

p is the teacher's distribution, q the student's, both softened; all words that were not kept are one word more.
"""

from __future__ import annotations

from itertools import pairwise
from math import exp, log
from typing import Any

import pytest
import torch

from distill_llm.cache.payload import Kept, Said
from distill_llm.cache.sampled import Sampled
from distill_llm.cache.top_k import TopK
from distill_llm.core.component import kinds
from distill_llm.core.signals import Signals
from distill_llm.core.sparse import SampledSignals, TopSignals
from distill_llm.losses.base import Loss
from distill_llm.losses.forward_kl import ForwardKL
from tests.golden.test_divergences import FORMULAS

N, V, K = 6, 13, 4
LOSSES: dict[str, Any] = {kind: cls for kind, cls in kinds(Loss, "distill_llm.losses").items() if "top_k" in cls.takes}
every_loss = pytest.mark.parametrize("kind", LOSSES)
every_temperature = pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])


def _logits(seed: int, scale: float = 2.0, count: int = N) -> torch.Tensor:
    return scale * torch.randn(count, V, generator=torch.Generator().manual_seed(seed))


def _signals(logits: torch.Tensor) -> Signals:
    ids = torch.zeros(len(logits), dtype=torch.long)
    return Signals(logits, ids, ids)


def _kept(teacher: torch.Tensor, payload: Any, temperatures: tuple[float, ...], key: int = 5) -> Any:
    """What a cache of ``payload`` gives back for these logits."""
    noise = payload.noise([key], [len(teacher)], len(temperatures))
    columns = payload.encode(Said(teacher, lambda logits: logits, temperatures, noise))
    return payload.decode(Kept(columns, _signals(teacher[:, :0]), teacher.size(-1), temperatures))


def _exact(teacher: torch.Tensor, k: int, temperature: float) -> TopSignals:
    """The same of top_k, without the rounding to two bytes."""
    top = teacher.topk(k)
    others = teacher.scatter(-1, top.indices, -torch.inf)
    odds = (others / temperature).logsumexp(-1) - (top.values / temperature).logsumexp(-1)
    none = torch.zeros(len(teacher), dtype=torch.long)
    log_probs = top.values - teacher.logsumexp(-1, keepdim=True)
    return TopSignals(none, none, teacher.size(-1), (temperature,), top.indices, log_probs, odds[:, None])


def _softened(logits: list[float], temperature: float) -> list[float]:
    weights = [exp((logit - max(logits)) / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def _coarse(student: list[float], teacher: list[float], k: int, temperature: float) -> list[list[float]]:
    """p and q of the teacher's k likeliest words, and of all others together."""
    kept = sorted(range(V), key=lambda word: -teacher[word])[:k]
    coarse = []
    for logits in (teacher, student):
        all_words = _softened(logits, temperature)
        others = [all_words[word] for word in range(V) if word not in kept]
        coarse.append([all_words[word] for word in kept] + ([sum(others)] if others else []))
    return coarse


@every_temperature
@pytest.mark.parametrize("name", FORMULAS)
def test_top_k_is_the_formula_on_k_words_and_the_rest(name: str, temperature: float) -> None:
    """The formulas are those that losses on all words are compared with."""
    plain, formula, power = FORMULAS[name]
    loss = plain.model_copy(update={"temperature": temperature})
    student, teacher = _logits(1), _logits(2)
    rows = list(zip(student.tolist(), teacher.tolist(), strict=True))
    expected = torch.tensor([temperature**power * formula(*_coarse(z, t, K, temperature)) for z, t in rows])
    found = loss.of_sparse(_signals(student), _exact(teacher, K, temperature))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    rounded = loss.of_sparse(_signals(student), _kept(teacher, TopK(k=K), (1.0, temperature)))
    torch.testing.assert_close(rounded, expected, atol=temperature**2 * 1e-3, rtol=2e-3)
    assert expected.min() > 1e-3, "teacher and student must differ, or little is compared"


def test_forward_kl_of_top_k_spelled_out() -> None:
    """Without any of our own formulas."""
    student, teacher = _logits(1), _logits(2)
    found = ForwardKL(temperature=2.0).of_sparse(_signals(student), _exact(teacher, K, 2.0))
    for value, z, t in zip(found.tolist(), student.tolist(), teacher.tolist(), strict=True):
        p, q = _coarse(z, t, K, 2.0)
        assert value == pytest.approx(4 * sum(a * log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-4)


@every_temperature
def test_gradient_of_top_k_is_that_of_the_formula(temperature: float) -> None:
    """Forward KL, by central differences: a word that was not kept moves the loss through the rest."""
    student, teacher = _logits(1), _logits(2)
    moved = student.clone().requires_grad_()
    loss = ForwardKL(temperature=temperature).of_sparse(_signals(moved), _exact(teacher, K, temperature))
    (gradient,) = torch.autograd.grad(loss.sum(), moved)
    for z, t, found in zip(student.tolist(), teacher.tolist(), gradient, strict=True):
        for word in range(V):
            values = []
            for step in (1e-5, -1e-5):
                p, q = _coarse([logit + step * (word == at) for at, logit in enumerate(z)], t, K, temperature)
                values.append(temperature**2 * sum(a * log(a / b) for a, b in zip(p, q, strict=True)))
            slope = (values[0] - values[1]) / 2e-5
            assert float(found[word]) == pytest.approx(slope, abs=5e-5 * max(1, temperature))


@every_temperature
@every_loss
def test_all_words_kept_is_the_loss_on_all_words(kind: str, temperature: float) -> None:
    loss = LOSSES[kind](temperature=temperature)
    student, teacher = _logits(1).requires_grad_(), _logits(2)
    dense = loss(_signals(student), _signals(teacher))
    (wanted,) = torch.autograd.grad(dense.sum(), student)
    for kept, exact in ((_exact(teacher, V, temperature), True), (_kept(teacher, TopK(k=99), (temperature,)), False)):
        found = loss.of_sparse(_signals(student), kept)
        (gradient,) = torch.autograd.grad(found.sum(), student)
        size = 2e-5 if exact else temperature**2 * 1e-3
        torch.testing.assert_close(found, dense, atol=size, rtol=size)
        torch.testing.assert_close(gradient, wanted, atol=size, rtol=size)


@every_loss
def test_fewer_words_never_say_more(kind: str) -> None:
    """Words taken together: no divergence grows by that."""
    loss = LOSSES[kind]()
    student, teacher = _logits(1), _logits(2)
    values = [loss.of_sparse(_signals(student), _exact(teacher, k, 1.0)) for k in (1, 2, 5, 9, V)]
    for fewer, more in pairwise(values):
        assert (fewer <= more + 1e-6).all()
        assert (fewer < more).any()


@every_loss
def test_top_k_is_zero_at_equality_and_not_negative(kind: str) -> None:
    loss = LOSSES[kind](temperature=2.0)
    same = loss.of_sparse(_signals(_logits(2)), _exact(_logits(2), K, 2.0))
    torch.testing.assert_close(same, torch.zeros(N), atol=1e-6, rtol=0)
    rounded = loss.of_sparse(_signals(_logits(2)), _kept(_logits(2), TopK(k=K), (2.0,)))
    assert rounded.abs().max() < 5e-3
    assert (loss.of_sparse(_signals(_logits(1)), _kept(_logits(2), TopK(k=K), (2.0,))) > 0).all()


@every_loss
@pytest.mark.parametrize("k", [1, K, V])
def test_top_k_is_finite_at_extremes(kind: str, k: int) -> None:
    """In bfloat16 at logits of 1e4, and where words are ruled out on both sides."""
    student = (_logits(1).sign() * 1e4).bfloat16().requires_grad_()
    teacher = (_logits(2).sign() * 1e4).bfloat16()
    found = LOSSES[kind]().of_sparse(_signals(student), _kept(teacher, TopK(k=k), (1.0,)))
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert found.isfinite().all()
    assert gradient.isfinite().all()
    muted = torch.arange(V) >= V - 2
    ruled = _logits(1).masked_fill(muted, -torch.inf).requires_grad_()
    kept = _kept(_logits(2).masked_fill(muted, -torch.inf), TopK(k=k), (1.0,))
    found = LOSSES[kind]().of_sparse(_signals(ruled), kept)
    (gradient,) = torch.autograd.grad(found.sum(), ruled)
    assert found.isfinite().all()
    assert gradient.isfinite().all()


def test_a_mass_of_the_rest_near_one_and_near_zero_is_kept() -> None:
    """A hot teacher, and a sure one: log(rest) and log(top) are right where the other is nearly all."""
    teacher = torch.zeros(2, 4000)
    teacher[1, 0] = 25.0
    for temperature in (1.0, 8.0):
        kept = _kept(teacher, TopK(k=2), (temperature,))
        log_p = kept.log_coarse(temperature).double()
        p = (teacher.double() / temperature).softmax(-1)
        rest = torch.stack([p[0, 2:].sum(), p[1, 1:].sum() - p[1, 1]]).log()
        torch.testing.assert_close(log_p[:, -1], rest, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2).double())
    assert kept.captured_mass()[0] == pytest.approx(2 / 4000, rel=1e-3)


TOKENS = 4000


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_sampled_is_unbiased_in_value_and_gradient(temperature: float) -> None:
    """One distribution, drawn for 4,000 tokens: means agree with the dense loss within what 48,000 draws allow."""
    student, teacher = _logits(1, count=1), _logits(2, count=1)
    loss = ForwardKL(temperature=temperature)
    spread = student.expand(TOKENS, V).clone().requires_grad_()
    kept = _kept(teacher.expand(TOKENS, V), Sampled(samples=12), (1.0, temperature) if temperature > 1 else (1.0,))
    assert isinstance(kept, SampledSignals)
    values = loss.of_sparse(_signals(spread), kept)
    (gradients,) = torch.autograd.grad(values.sum(), spread)
    one = student.clone().requires_grad_()
    dense = loss(_signals(one), _signals(teacher))
    (wanted,) = torch.autograd.grad(dense.sum(), one)
    error = values.std() / TOKENS**0.5
    assert error < 0.05 * dense, "the draws must be many enough to tell"
    assert abs(values.mean() - dense) < 4 * error + 1e-3 * temperature**2
    torch.testing.assert_close(gradients.mean(0), wanted[0], atol=0.02 * temperature, rtol=0)
    assert gradients.mean(0).abs().max() > 0.2


def test_draws_depend_on_the_row_alone() -> None:
    teacher = _logits(2)
    first, again, other = (_kept(teacher, Sampled(samples=5), (1.0,), key=key) for key in (3, 3, 4))
    assert torch.equal(first.word_ids, again.word_ids)
    assert not torch.equal(first.word_ids, other.word_ids)
    payload = Sampled(samples=5)
    both = payload.noise([3, 4], [2, N], 1)
    assert both is not None
    assert torch.equal(both[2:], payload.noise([4], [N], 1))


def test_a_sure_teacher_draws_its_word_and_nothing_that_is_ruled_out() -> None:
    teacher = torch.full((3, V), -torch.inf)
    teacher[:, 5] = 0.0
    teacher[2, 12] = 0.0
    kept = _kept(teacher, Sampled(samples=200), (1.0,))
    assert kept.word_ids[:2].unique().tolist() == [5]
    assert kept.word_ids[2].unique().tolist() == [5, 12]
    torch.testing.assert_close(kept.entropy(), torch.tensor([0.0, 0.0, log(2)]), atol=1e-3, rtol=0)
    assert kept.likeliest()[:2].tolist() == [5, 5]


@pytest.mark.parametrize(("payload", "most"), [(TopK(k=32), 140), (Sampled(samples=12), 45)], ids=["top_k", "sampled"])
def test_a_token_of_152k_words_is_small(payload: Any, most: int) -> None:
    width = 151_936
    teacher = torch.randn(8, width)
    columns = payload.encode(Said(teacher, lambda logits: logits, (1.0,), payload.noise([1], [8], 1)))
    assert sum(column.nbytes for column in columns.values()) / 8 <= most
    kept = payload.decode(Kept(columns, _signals(teacher[:, :0]), width, (1.0,)))
    assert torch.equal(kept.likeliest(), teacher.argmax(-1))
    if isinstance(kept, TopSignals):
        assert torch.equal(kept.word_ids, teacher.topk(32).indices)
