"""Each loss against its formula in float64, and what every loss must hold."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from distill_llm.core.component import kinds
from distill_llm.core.signals import Signals
from distill_llm.losses.base import Loss
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.losses.forward_kl import ForwardKL

N, V = 7, 11
LOSSES = [CrossEntropy(), ForwardKL(), ForwardKL(temperature=0.5), ForwardKL(temperature=4.0)]
DIVERGENCES = [loss for loss in LOSSES if loss.needs_teacher]


def _signals(logits: torch.Tensor, ids: torch.Tensor | None = None) -> Signals:
    ids = torch.arange(len(logits)) % logits.size(-1) if ids is None else ids
    return Signals(logits, ids, torch.zeros_like(ids))


def _logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


def _naive_forward_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * sum_v p(v) log(p(v) / q(v)), token by token and word by word, with its own softmax in float64."""
    values = []
    for s, t in zip(student.double(), teacher.double(), strict=True):
        q = (s / temperature).exp() / (s / temperature).exp().sum()
        p = (t / temperature).exp() / (t / temperature).exp().sum()
        values.append(sum(p[v] * torch.log(p[v] / q[v]) for v in range(V)) * temperature**2)
    return torch.stack(values)


def test_every_loss_is_tested_here() -> None:
    """A new loss joins LOSSES, and gets a formula of its own below."""
    assert {type(loss) for loss in LOSSES} == set(kinds(Loss, "distill_llm.losses").values())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_forward_kl_is_the_formula(temperature: float) -> None:
    student, teacher = _logits(1), _logits(2)
    got = ForwardKL(temperature=temperature)(_signals(student), _signals(teacher))
    torch.testing.assert_close(got.double(), _naive_forward_kl(student, teacher, temperature), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_forward_kl_is_torchs_kl_div(temperature: float) -> None:
    student, teacher = _logits(1), _logits(2)
    expected = functional.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1), log_target=True,
        reduction="none",
    )  # fmt: skip
    got = ForwardKL(temperature=temperature)(_signals(student), _signals(teacher))
    torch.testing.assert_close(got, expected.sum(-1) * temperature**2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_forward_kls_gradient_is_that_of_the_formula(temperature: float) -> None:
    """T * (q - p) for each word: the factor T^2 is in the gradient, not only in the number (Hinton et al. 2015)."""
    student, teacher = _logits(1).requires_grad_(), _logits(2)
    (got,) = torch.autograd.grad(
        ForwardKL(temperature=temperature)(_signals(student), _signals(teacher)).sum(), student
    )
    (naive,) = torch.autograd.grad(_naive_forward_kl(student, teacher, temperature).sum(), student)
    torch.testing.assert_close(got, naive.float(), atol=1e-5, rtol=1e-5)
    by_hand = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    torch.testing.assert_close(got, by_hand.detach(), atol=1e-5, rtol=1e-5)


def test_forward_kl_looks_from_the_teachers_side() -> None:
    """A word that only the teacher expects costs much; one that only the student expects costs little."""
    sure, unsure = torch.tensor([[20.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    missed = ForwardKL()(_signals(sure), _signals(unsure)).item()
    spread = ForwardKL()(_signals(unsure), _signals(sure)).item()
    assert missed == pytest.approx(20 * 2 / 3 - torch.log(torch.tensor(3.0)).item(), abs=1e-4)
    assert spread == pytest.approx(torch.log(torch.tensor(3.0)).item(), abs=1e-4)


def test_cross_entropy_is_minus_the_log_probability_of_the_token() -> None:
    logits, ids = _logits(1), torch.tensor([3, 0, 10, 10, 1, 2, 5])
    got = CrossEntropy()(_signals(logits, ids), None)
    wide = logits.double()
    expected = [-(wide[n, i] - wide[n].exp().sum().log()) for n, i in enumerate(ids.tolist())]
    torch.testing.assert_close(got.double(), torch.stack(expected), atol=1e-6, rtol=1e-6)


def test_cross_entropys_gradient_is_probability_minus_one_at_the_token() -> None:
    logits, ids = _logits(1).requires_grad_(), torch.tensor([3, 0, 10, 10, 1, 2, 5])
    (got,) = torch.autograd.grad(CrossEntropy()(_signals(logits, ids), None).sum(), logits)
    torch.testing.assert_close(got, logits.detach().softmax(-1) - functional.one_hot(ids, V))


@pytest.mark.parametrize("loss", DIVERGENCES, ids=repr)
def test_no_loss_where_student_and_teacher_agree(loss: Loss) -> None:
    logits = _logits(1).requires_grad_()
    same = loss(_signals(logits), _signals(logits.detach().clone()))
    assert same.abs().max() < 1e-6
    shifted = loss(_signals(logits.detach() + 5), _signals(logits.detach()))
    assert shifted.abs().max() < 1e-5, "a constant on all logits is no difference"
    (gradient,) = torch.autograd.grad(same.sum(), logits)
    assert gradient.abs().max() < 1e-6


def test_cross_entropy_vanishes_for_a_student_that_is_sure_and_right() -> None:
    assert CrossEntropy()(_signals(100.0 * torch.eye(V)), None).abs().max() < 1e-6


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_never_negative(loss: Loss) -> None:
    for seed in range(20):
        student, teacher = _logits(seed, scale=10.0), _logits(seed + 100, scale=10.0)
        assert loss(_signals(student), _signals(teacher)).min() >= -1e-6
        assert loss(_signals(student), _signals(student + 1e-3 * teacher)).min() >= -1e-5  # float32 rounding, times T^2


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_finite_in_bfloat16_at_huge_logits(loss: Loss) -> None:
    huge = 1e4 * (2 * (torch.rand(N, V, generator=torch.Generator().manual_seed(3)) > 0.5).float() - 1)
    student = huge.bfloat16().requires_grad_()
    values = loss(_signals(student), _signals(-huge.bfloat16()))
    assert values.dtype == torch.float32
    assert values.isfinite().all()
    assert values.max() > 1e3, "opposite opinions at such logits are costly"
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_only_the_student_gets_a_gradient(loss: Loss) -> None:
    student, teacher = _logits(1).requires_grad_(), _logits(2).requires_grad_()
    loss(_signals(student), _signals(teacher)).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 1e-3
    assert teacher.grad is None


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_each_token_is_on_its_own(loss: Loss) -> None:
    """One value a token, in order, and none for no token."""
    student, teacher = _logits(1), _logits(2)
    values = loss(_signals(student), _signals(teacher))
    backwards = loss(_signals(student.flip(0), _signals(student).token_ids.flip(0)), _signals(teacher.flip(0)))
    torch.testing.assert_close(values, backwards.flip(0))
    assert loss(_signals(student[:0]), _signals(teacher[:0])).shape == (0,)
