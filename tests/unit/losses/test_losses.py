"""What every loss must hold, with cross-entropy's own formula; those of the others are in tests/golden."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from distill_llm.core.component import kinds
from distill_llm.core.schedule import Schedule
from distill_llm.core.signals import Signals
from distill_llm.losses.base import Divergence, Loss
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.losses.jensen_shannon import JensenShannon
from distill_llm.losses.logit_mse import LogitMSE
from distill_llm.losses.reverse_kl import ReverseKL
from distill_llm.losses.skew_forward_kl import SkewForwardKL
from distill_llm.losses.skew_reverse_kl import SkewReverseKL
from distill_llm.losses.total_variation import TotalVariation
from distill_llm.losses.universal_logit import UniversalLogit

N, V = 7, 11
BOUNDED = (JensenShannon, SkewForwardKL, SkewReverseKL, TotalVariation, UniversalLogit)
LOSSES = [
    CrossEntropy(),
    LogitMSE(),
    *(cls(temperature=temperature) for cls in (ForwardKL, ReverseKL, *BOUNDED) for temperature in (0.5, 1.0, 4.0)),
    *(cls(mixture=mixture) for cls in BOUNDED[:3] for mixture in (0.02, 0.8)),
]
TAUGHT = [loss for loss in LOSSES if loss.needs_teacher]
DIVERGENCES = [cls for cls in kinds(Loss, "distill_llm.losses").values() if issubclass(cls, Divergence)]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)
every_taught_loss = pytest.mark.parametrize("loss", TAUGHT, ids=repr)
every_divergence = pytest.mark.parametrize("cls", DIVERGENCES)


def _signals(logits: torch.Tensor, ids: torch.Tensor | None = None) -> Signals:
    ids = torch.arange(len(logits)) % logits.size(-1) if ids is None else ids
    return Signals(logits, ids, torch.zeros_like(ids))


def _logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


def test_every_loss_is_tested_here() -> None:
    """A new loss joins LOSSES, and gets its formula in tests/golden/test_divergences.py."""
    assert {type(loss) for loss in LOSSES} == set(kinds(Loss, "distill_llm.losses").values())


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


def test_cross_entropy_vanishes_for_a_student_that_is_sure_and_right() -> None:
    assert CrossEntropy()(_signals(100.0 * torch.eye(V)), None).abs().max() < 1e-6


@every_taught_loss
def test_no_loss_where_student_and_teacher_agree(loss: Loss) -> None:
    logits = _logits(1).requires_grad_()
    same = loss(_signals(logits), _signals(logits.detach().clone()))
    assert same.abs().max() < 5e-6
    shifted = loss(_signals(logits.detach() + 5), _signals(logits.detach()))
    assert shifted.abs().max() < 1e-5, "a constant on all logits is no difference"
    (gradient,) = torch.autograd.grad(same.sum(), logits)
    if not isinstance(
        loss, TotalVariation | UniversalLogit
    ):  # which have a kink there: rounding decides the direction, not the size
        assert gradient.abs().max() < 1e-5


@every_loss
def test_never_negative(loss: Loss) -> None:
    for seed in range(20):
        student, teacher = _logits(seed, scale=10.0), _logits(seed + 100, scale=10.0)
        assert loss(_signals(student), _signals(teacher)).min() >= -1e-6
        assert loss(_signals(student), _signals(student + 1e-3 * teacher)).min() >= -1e-5  # float32 rounding, times T^2


@every_loss
def test_finite_in_bfloat16_at_huge_logits(loss: Loss) -> None:
    huge = 1e4 * (2 * (torch.rand(N, V, generator=torch.Generator().manual_seed(3)) > 0.5).float() - 1)
    student = huge.bfloat16().requires_grad_()
    values = loss(_signals(student), _signals(-huge.bfloat16()))
    assert values.dtype == torch.float32
    assert values.isfinite().all()
    # opposite opinions are costly; the least that a bound leaves is JSD with a mixture of 0.02: 0.098 nats
    assert values.max() > (0.09 if isinstance(loss, BOUNDED) else 1e3)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert gradient.dtype == torch.bfloat16
    assert gradient.isfinite().all()


@every_loss
def test_float32_is_enough(loss: Loss) -> None:
    """Half-precision logits are read exactly: the loss of bfloat16 logits is that of the same numbers in float32."""
    student, teacher = _logits(1).bfloat16(), _logits(2).bfloat16()
    torch.testing.assert_close(
        loss(_signals(student), _signals(teacher)), loss(_signals(student.float()), _signals(teacher.float()))
    )


@every_loss
def test_only_the_student_gets_a_gradient(loss: Loss) -> None:
    student, teacher = _logits(1).requires_grad_(), _logits(2).requires_grad_()
    loss(_signals(student), _signals(teacher)).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 1e-3
    assert teacher.grad is None


@every_loss
def test_each_token_is_on_its_own(loss: Loss) -> None:
    """One value a token, in order, and none for no token."""
    student, teacher = _logits(1), _logits(2)
    values = loss(_signals(student), _signals(teacher))
    backwards = loss(_signals(student.flip(0), _signals(student).token_ids.flip(0)), _signals(teacher.flip(0)))
    torch.testing.assert_close(values, backwards.flip(0))
    assert loss(_signals(student[:0]), _signals(teacher[:0])).shape == (0,)


@every_divergence
def test_a_scheduled_temperature_is_that_of_the_progress(cls: type[Divergence]) -> None:
    student, teacher = _signals(_logits(1)), _signals(_logits(2))
    scheduled = cls(temperature=Schedule(start=4.0, end=1.0, over=0.5))
    for progress, temperature in ((0.0, 4.0), (0.25, 2.5), (0.5, 1.0), (0.9, 1.0)):
        expected = cls(temperature=temperature)(student, teacher)
        torch.testing.assert_close(scheduled.at(progress)(student, teacher), expected)
    assert isinstance(scheduled.temperature, Schedule), "the loss itself stays as it is"


@every_loss
def test_a_loss_without_a_schedule_is_always_the_same(loss: Loss) -> None:
    assert loss.at(0.0) == loss.at(0.7) == loss


@every_divergence
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan"), {"start": 2, "end": 0}])
def test_a_temperature_that_is_none_is_refused(cls: type[Divergence], temperature: object) -> None:
    with pytest.raises(ValidationError, match=r"temperature"):
        cls.model_validate({"temperature": temperature})


@pytest.mark.parametrize("cls", BOUNDED[:3])
@pytest.mark.parametrize("mixture", [0.0, 1.0, -0.1])
def test_a_mixture_of_one_model_alone_is_refused(cls: type[Divergence], mixture: float) -> None:
    """Nothing would be compared, or another loss is meant."""
    with pytest.raises(ValidationError, match="mixture"):
        cls.model_validate({"mixture": mixture})
