"""Each loss with a teacher against its formula, word by word in float64, and against what others compute.

p is the teacher's distribution, q the student's, both softened; formulas know neither torch nor logarithms of softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, inf, log
from typing import Any, TypeAlias

import pytest
import torch
from torch.nn import functional

from distill_llm.core.component import kinds
from distill_llm.core.signals import Signals
from distill_llm.losses.base import Divergence, Loss
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.losses.jensen_shannon import JensenShannon
from distill_llm.losses.logit_mse import LogitMSE
from distill_llm.losses.reverse_kl import ReverseKL
from distill_llm.losses.skew_forward_kl import SkewForwardKL
from distill_llm.losses.skew_reverse_kl import SkewReverseKL
from distill_llm.losses.total_variation import TotalVariation
from distill_llm.losses.universal_logit import UniversalLogit

Words: TypeAlias = list[float]
N, V = 5, 9


def _kl(p: Words, q: Words) -> float:
    """sum p log(p / q), where 0 log 0 is 0 and a word of p that q never says costs without end."""
    return sum(a * (log(a / b) if b > 0 else inf) for a, b in zip(p, q, strict=True) if a > 0)


def _blend(p: Words, q: Words, share_of_p: float) -> Words:
    return [share_of_p * a + (1 - share_of_p) * b for a, b in zip(p, q, strict=True)]


def _jensen_shannon(p: Words, q: Words, beta: float) -> float:
    """Agarwal et al. 2024, arXiv:2306.13649, eq. 1; what TRL's GKD trainer computes too."""
    middle = _blend(p, q, beta)
    return beta * _kl(p, middle) + (1 - beta) * _kl(q, middle)


def _total_variation(p: Words, q: Words) -> float:
    return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


def _of_sorted(p: Words, q: Words) -> float:
    """Boizard et al. 2024, arXiv:2402.12030: the likeliest word beside the likeliest, and 0 where one has no more."""
    width = max(len(p), len(q))
    ordered = [sorted(words, reverse=True) + [0.0] * (width - len(words)) for words in (p, q)]
    return sum(abs(a - b) for a, b in zip(*ordered, strict=True))


FORMULAS: dict[str, tuple[Divergence, Callable[[Words, Words], float], int]] = {
    "forward_kl": (ForwardKL(), _kl, 2),
    "reverse_kl": (ReverseKL(), lambda p, q: _kl(q, p), 2),
    "jensen_shannon": (JensenShannon(), lambda p, q: _jensen_shannon(p, q, 0.5), 2),
    "jensen_shannon of 0.1": (JensenShannon(mixture=0.1), lambda p, q: _jensen_shannon(p, q, 0.1), 2),
    "jensen_shannon of 0.9": (JensenShannon(mixture=0.9), lambda p, q: _jensen_shannon(p, q, 0.9), 2),
    # Ko et al. 2024, arXiv:2402.03898, sec. 3.1
    "skew_forward_kl": (SkewForwardKL(), lambda p, q: _kl(p, _blend(p, q, 0.1)), 2),
    "skew_forward_kl of 0.7": (SkewForwardKL(mixture=0.7), lambda p, q: _kl(p, _blend(p, q, 0.7)), 2),
    "skew_reverse_kl": (SkewReverseKL(), lambda p, q: _kl(q, _blend(q, p, 0.1)), 2),
    "skew_reverse_kl of 0.7": (SkewReverseKL(mixture=0.7), lambda p, q: _kl(q, _blend(q, p, 0.7)), 2),
    "total_variation": (TotalVariation(), _total_variation, 1),
    "universal_logit": (UniversalLogit(), _of_sorted, 1),
}
every_divergence = pytest.mark.parametrize("name", FORMULAS)
every_temperature = pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])


def _logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


def _signals(logits: torch.Tensor) -> Signals:
    ids = torch.zeros(len(logits), dtype=torch.long)
    return Signals(logits, ids, ids)


def _at(loss: Divergence, temperature: float) -> Divergence:
    return loss.model_copy(update={"temperature": temperature})


def _value_and_gradient(loss: Loss, student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    student = student.clone().requires_grad_()
    values = loss(_signals(student), _signals(teacher))
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), gradient


def _softened(logits: Words, temperature: float) -> Words:
    weights = [exp((logit - max(logits)) / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def _naive(name: str, student: Words, teacher: Words, temperature: float) -> float:
    _, formula, power = FORMULAS[name]
    return temperature**power * formula(_softened(teacher, temperature), _softened(student, temperature))


def _naive_mse(student: Words, teacher: Words) -> float:
    middle_z, middle_t = sum(student) / len(student), sum(teacher) / len(teacher)
    return sum(((z - middle_z) - (t - middle_t)) ** 2 for z, t in zip(student, teacher, strict=True)) / len(student)


def _slopes(value: Callable[[Words], float], at: Words, step: float = 1e-5) -> Words:
    """Central differences, word by word."""
    moved = [[logit + step * sign * (v == w) for w, logit in enumerate(at)] for v in range(len(at)) for sign in (1, -1)]
    values = [value(logits) for logits in moved]
    return [(up - down) / (2 * step) for up, down in zip(values[::2], values[1::2], strict=True)]


def test_every_loss_with_a_teacher_has_a_formula_here() -> None:
    found = {type(loss) for loss, _, _ in FORMULAS.values()} | {LogitMSE}
    assert found == {cls for cls in kinds(Loss, "distill_llm.losses").values() if cls.needs_teacher}


@every_temperature
@every_divergence
def test_value_and_gradient_are_those_of_the_formula(name: str, temperature: float) -> None:
    student, teacher = _logits(1), _logits(2)
    got, gradient = _value_and_gradient(_at(FORMULAS[name][0], temperature), student, teacher)
    rows = list(zip(student.tolist(), teacher.tolist(), strict=True))
    expected = [_naive(name, z, t, temperature) for z, t in rows]
    slopes = [_slopes(lambda moved, t=t: _naive(name, moved, t, temperature), z) for z, t in rows]
    torch.testing.assert_close(got.double(), torch.tensor(expected).double(), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(gradient.double(), torch.tensor(slopes).double(), atol=2e-5, rtol=2e-5)
    assert min(expected) > 1e-2, "teacher and student must differ, or little is compared"


@every_temperature
@pytest.mark.parametrize("widths", [(V, V - 4), (V - 4, V), (1, V), (V, 1)], ids=str)
def test_vocabularies_of_two_sizes_are_compared_by_rank(widths: tuple[int, int], temperature: float) -> None:
    student, teacher = _logits(1)[:, : widths[0]], _logits(2)[:, : widths[1]]
    got, gradient = _value_and_gradient(UniversalLogit(temperature=temperature), student, teacher)
    rows = list(zip(student.tolist(), teacher.tolist(), strict=True))
    expected = [_naive("universal_logit", z, t, temperature) for z, t in rows]
    slopes = [_slopes(lambda moved, t=t: _naive("universal_logit", moved, t, temperature), z) for z, t in rows]
    torch.testing.assert_close(got.double(), torch.tensor(expected).double(), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(gradient.double(), torch.tensor(slopes).double(), atol=2e-5, rtol=2e-5)
    assert min(expected) > 1e-2


def test_which_word_is_meant_is_all_the_same_to_it() -> None:
    """So it is zero for the same opinion of other words, and where the larger vocabulary's rest is never said."""
    student = _logits(1)
    shuffled = student[:, torch.randperm(V, generator=torch.Generator().manual_seed(5))]
    assert UniversalLogit()(_signals(student), _signals(shuffled)).abs().max() < 1e-6
    wide = torch.cat([torch.full((N, 3), -inf), student, torch.full((N, 2), -1e4)], -1)
    assert UniversalLogit()(_signals(student), _signals(wide)).abs().max() < 1e-6
    assert UniversalLogit()(_signals(wide), _signals(student)).abs().max() < 1e-6


def test_vocabularies_of_two_sizes_in_bfloat16_at_huge_logits() -> None:
    student = (1e4 * _logits(1).sign()).bfloat16().requires_grad_()
    teacher = torch.cat([-student.detach(), student.detach()], -1).requires_grad_()
    found = UniversalLogit()(_signals(student), _signals(teacher))
    found.sum().backward()
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_squared_differences_are_those_of_the_formula() -> None:
    student, teacher = _logits(1) + 3.0, _logits(2) - 4.0
    got, gradient = _value_and_gradient(LogitMSE(), student, teacher)
    rows = list(zip(student.tolist(), teacher.tolist(), strict=True))
    expected = [_naive_mse(z, t) for z, t in rows]
    slopes = [_slopes(lambda moved, t=t: _naive_mse(moved, t), z) for z, t in rows]
    torch.testing.assert_close(got.double(), torch.tensor(expected).double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), torch.tensor(slopes).double(), atol=1e-5, rtol=1e-5)
    # and torch's own, of logits that are centred by hand
    z, t = (logits - logits.mean(-1, keepdim=True) for logits in (student, teacher))
    torch.testing.assert_close(got, functional.mse_loss(z, t, reduction="none").mean(-1))


@every_temperature
def test_forward_and_reverse_kl_are_torchs(temperature: float) -> None:
    """``kl_div(input, target)`` is KL(target || input), of logarithms."""
    student, teacher = _logits(1), _logits(2)
    log_q, log_p = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    forward = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * temperature**2
    backward = functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1) * temperature**2
    got = [cls(temperature=temperature)(_signals(student), _signals(teacher)) for cls in (ForwardKL, ReverseKL)]
    torch.testing.assert_close(got[0], forward)
    torch.testing.assert_close(got[1], backward)


@every_temperature
def test_forward_kls_gradient_is_temperature_times_the_difference(temperature: float) -> None:
    """T (q - p) for each word (Hinton et al. 2015, eq. 2): the factor is in the gradient, not only in the number."""
    student, teacher = _logits(1), _logits(2)
    _, gradient = _value_and_gradient(ForwardKL(temperature=temperature), student, teacher)
    by_hand = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    torch.testing.assert_close(gradient, by_hand, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_that_of_trl(beta: float) -> None:
    pytest.importorskip("trl")
    try:
        from trl.experimental.gkd import GKDTrainer  # pyright: ignore[reportMissingImports]
    except ImportError:
        from trl import GKDTrainer  # pyright: ignore[reportMissingImports]
    student, teacher = _logits(1), _logits(2)
    theirs = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, temperature=2.0, reduction="sum")
    ours = JensenShannon(mixture=beta, temperature=2.0)(_signals(student), _signals(teacher)).sum()
    torch.testing.assert_close(ours / 4, theirs)  # theirs has no factor temperature^2


@pytest.mark.parametrize(
    ("loss", "beta"),
    [
        (ForwardKL(temperature=2.0), 0.0),
        (JensenShannon(mixture=0.3, temperature=2.0), 0.3),
        (ReverseKL(temperature=2.0), 1.0),
    ],
    ids=repr,
)
def test_values_and_gradients_are_those_of_trls_chunked_divergence(loss: Divergence, beta: float) -> None:
    """Which makes the logits itself, tile by tile, from hidden states and heads, and derives by hand."""
    kernels = pytest.importorskip("trl.kernels.chunked_divergence")
    hidden, taught = torch.randn(2, N, 3, generator=torch.Generator().manual_seed(1)).unbind()
    weight, head = (2 * torch.randn(2, V, 3, generator=torch.Generator().manual_seed(2))).unbind()
    learned = hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    theirs, _ = kernels.ChunkedDivergenceFunction.apply(hidden, weight, None, taught, head, None, beta, 2.0)
    ours = loss(_signals(hidden @ weight.T), _signals(taught @ head.T))
    torch.testing.assert_close(ours / 4, theirs)  # theirs has no factor temperature^2
    upstream = torch.rand(N, generator=torch.Generator().manual_seed(3))
    expected = torch.autograd.grad(theirs, learned, upstream)
    for got, wanted in zip(torch.autograd.grad(ours / 4, learned, upstream), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@every_divergence
def test_the_size_of_the_gradient_does_not_depend_on_the_temperature(name: str) -> None:
    """Far above all logits a doubled temperature changes nothing; without the factor it would halve or quarter it."""
    warm, hot = (
        _value_and_gradient(_at(FORMULAS[name][0], temperature), _logits(1), _logits(2))[1].norm().item()
        for temperature in (200.0, 400.0)
    )
    assert hot == pytest.approx(warm, rel=0.02)


# What T^2 * divergence tends to, as a share of the mean squared difference: second derivatives at equality.
CURVATURES = {
    "forward_kl": 1 / 2,
    "reverse_kl": 1 / 2,
    "jensen_shannon": 1 / 8,
    "jensen_shannon of 0.1": 0.1 * 0.9 / 2,
    "skew_forward_kl": 0.9**2 / 2,
    "skew_reverse_kl of 0.7": 0.3**2 / 2,
}


@pytest.mark.parametrize("name", CURVATURES)
def test_at_high_temperatures_it_is_a_share_of_the_squared_differences(name: str) -> None:
    """Hinton et al. 2015, sec. 2.1, for the forward KL; the gradients likewise."""
    student, teacher = _logits(1), _logits(2)
    value, gradient = _value_and_gradient(_at(FORMULAS[name][0], 300.0), student, teacher)
    squared, slope = _value_and_gradient(LogitMSE(), student, teacher)
    torch.testing.assert_close(value, CURVATURES[name] * squared, rtol=0.05, atol=0.0)
    torch.testing.assert_close(gradient, CURVATURES[name] * slope, rtol=0.05, atol=0.01)


def _close(loss: Loss, factor: float, limit: Loss, *, rel: float) -> None:
    student, teacher = _logits(1, 1.0), _logits(2, 1.0)
    value, gradient = _value_and_gradient(loss, student, teacher)
    expected, slope = _value_and_gradient(limit, student, teacher)
    torch.testing.assert_close(value / factor, expected, rtol=rel, atol=0.0)
    torch.testing.assert_close(gradient / factor, slope, rtol=rel, atol=rel)


def test_limits_of_mixtures() -> None:
    """Agarwal et al. 2024, sec. 2: JSD over its mixture tends to the forward KL, over the rest to the reverse."""
    _close(JensenShannon(mixture=1e-3), 1e-3, ForwardKL(), rel=0.02)
    _close(JensenShannon(mixture=1 - 1e-3), 1e-3, ReverseKL(), rel=0.02)
    _close(SkewForwardKL(mixture=1e-6), 1.0, ForwardKL(), rel=1e-3)
    _close(SkewReverseKL(mixture=1e-6), 1.0, ReverseKL(), rel=1e-3)


def test_jensen_shannon_is_the_same_from_both_sides() -> None:
    student, teacher = _signals(_logits(1)), _signals(_logits(2))
    torch.testing.assert_close(JensenShannon()(student, teacher), JensenShannon()(teacher, student))
    torch.testing.assert_close(
        JensenShannon(mixture=0.2)(student, teacher), JensenShannon(mixture=0.8)(teacher, student)
    )
    torch.testing.assert_close(TotalVariation()(student, teacher), TotalVariation()(teacher, student))


def test_bounds() -> None:
    """What each says of two models that share no word; nothing else is worse."""
    apart = 200.0 * torch.eye(V)[:2]
    student, teacher = _signals(apart[:1]), _signals(apart[1:])
    worst: list[tuple[Loss, float]] = [
        (TotalVariation(), 1.0),
        (JensenShannon(), log(2)),
        (JensenShannon(mixture=0.1), -(0.1 * log(0.1) + 0.9 * log(0.9))),
        (SkewForwardKL(), -log(0.1)),
        (SkewReverseKL(mixture=0.3), -log(0.3)),
    ]
    for loss, bound in worst:
        assert loss(student, teacher).item() == pytest.approx(bound, rel=1e-5)
        for seed in range(20):
            values = loss(_signals(_logits(seed, 20.0)), _signals(_logits(seed + 50, 20.0)))
            assert values.max() <= bound + 1e-5


def test_directions() -> None:
    """Teacher torn between two words, student sure of one: dear for the forward KL, cheap for the reverse."""
    torn, sure = torch.tensor([[10.0, 10.0, -10.0]]), torch.tensor([[10.0, -10.0, -10.0]])
    found = {cls: cls()(_signals(sure), _signals(torn)).item() for cls in (ForwardKL, ReverseKL)}
    assert found[ForwardKL] == pytest.approx(10 - log(2), abs=1e-3)
    assert found[ReverseKL] == pytest.approx(log(2), abs=1e-3)


NEVER = 3  # the word that somebody never says


def _without_the_word(logits: torch.Tensor) -> torch.Tensor:
    return torch.cat([logits[:, :NEVER], logits[:, NEVER + 1 :]], -1)


def _mute(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.clone()
    logits[:, NEVER] = -inf
    return logits


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@every_divergence
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_word_that_one_of_them_never_says(who: str, name: str, temperature: float) -> None:
    """The formula's value, with a gradient that is finite; without end where the divergence itself is."""
    student, teacher = _logits(1), _logits(2)
    student, teacher = (student, _mute(teacher)) if who == "teacher" else (_mute(student), teacher)
    loss = _at(FORMULAS[name][0], temperature)
    rows = list(zip(student.tolist(), teacher.tolist(), strict=True))
    expected = [_naive(name, z, t, temperature) for z, t in rows]
    value, gradient = _value_and_gradient(loss, student, teacher)
    torch.testing.assert_close(value.double(), torch.tensor(expected).double(), atol=2e-5, rtol=2e-5)
    endless = (who, name) in (("teacher", "reverse_kl"), ("student", "forward_kl"))
    assert value.isinf().all() == endless
    if endless:
        return
    assert gradient.isfinite().all()
    if who == "student":
        assert gradient[:, NEVER].abs().max() == 0, "no step moves a logit of -inf"
        return
    slopes = [_slopes(lambda moved, t=t: _naive(name, moved, t, temperature), z) for z, t in rows]
    torch.testing.assert_close(gradient.double(), torch.tensor(slopes).double(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("loss", [*(loss for loss, _, _ in FORMULAS.values()), LogitMSE()], ids=repr)
def test_a_word_that_nobody_ever_says_is_as_if_there_were_none(loss: Loss) -> None:
    student, teacher = _logits(1), _logits(2)
    value, gradient = _value_and_gradient(loss, _mute(student), _mute(teacher))
    without, slopes = _value_and_gradient(loss, _without_the_word(student), _without_the_word(teacher))
    torch.testing.assert_close(value, without)
    torch.testing.assert_close(_without_the_word(gradient), slopes)
    assert gradient[:, NEVER].abs().max() == 0


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_squared_differences_leave_a_word_out_that_one_never_says(who: str) -> None:
    """A difference to -inf is no number."""
    student, teacher = _logits(1), _logits(2)
    muted = (student, _mute(teacher)) if who == "teacher" else (_mute(student), teacher)
    value, gradient = _value_and_gradient(LogitMSE(), *muted)
    without, slopes = _value_and_gradient(LogitMSE(), _without_the_word(student), _without_the_word(teacher))
    torch.testing.assert_close(value, without)
    torch.testing.assert_close(_without_the_word(gradient), slopes)
    assert gradient[:, NEVER].abs().max() == 0


@pytest.mark.parametrize(("loss", "mute"), [(ReverseKL(), "teacher"), (ForwardKL(), "student")])
def test_a_probability_too_small_for_float32_costs_nothing(loss: Loss, mute: str) -> None:
    """exp(-1000) is 0 in float32; times the logarithm of a word that the other never says it would be NaN."""
    small = _logits(1)
    small[:, NEVER] = -1000.0
    models = {"teacher": small, "student": small} | {mute: _mute(_logits(2))}
    value, gradient = _value_and_gradient(loss, models["student"], models["teacher"])
    without = [_without_the_word(models[who]) for who in ("student", "teacher")]
    torch.testing.assert_close(value, loss(_signals(without[0]), _signals(without[1])))
    assert gradient.isfinite().all()


@every_divergence
def test_a_nan_is_not_hidden(name: str) -> None:
    broken: Any = _logits(1)
    broken[0, 0] = float("nan")
    for loss in (FORMULAS[name][0], LogitMSE()):
        values = loss(_signals(broken), _signals(_logits(2)))
        assert values.isnan().tolist() == [True, False, False, False, False]
