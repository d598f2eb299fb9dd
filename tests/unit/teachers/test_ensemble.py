"""Several teachers as one: what the mixture is, in chunks too, and that each is opened and counted as it should be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError

from distill_llm.core.signals import Signals
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.losses.logit_mse import LogitMSE
from distill_llm.losses.reverse_kl import ReverseKL
from distill_llm.models.head import OutputHead
from distill_llm.objective import Objective, Term
from distill_llm.pipeline.trial import open_teachers
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.base import with_members
from distill_llm.teachers.ensemble import Ensemble, EnsembleTeacher, mixed
from distill_llm.teachers.frozen import FrozenTeacher

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distill_llm.losses.base import Loss
    from distill_llm.models.load import LoadedModel

# The second row's target comes first among lazy tokens, the first row's among ready ones.
ROWS = [
    Row(0, "rationale", [5], [9, 10, 11, 12, 1]),
    Row(0, "label", [5, 6, 7], [8, 1]),
    Row(1, "rationale", [5, 9], [13, 10, 1]),
]
WAYS = [("probabilities", "fixed"), ("probabilities", "confidence"), ("logits", "fixed"), ("logits", "confidence")]
every_way = pytest.mark.parametrize(("mean", "by"), WAYS, ids=["-".join(way) for way in WAYS])
YAML = """
name: tiny
task: {kind: shop}
student: {model: a/b}
teachers:
  a: {kind: frozen, model: FOLDER/a}
  b: {kind: frozen, model: FOLDER/b}
  pair: {kind: ensemble, of: [b, a], weights: [3, 1]}
  all: {kind: ensemble, of: [pair, a, own]}
  own: {kind: ema}
objective: [{name: soft, loss: {kind: forward_kl}, targets: [label], teacher: all}]
train: {max_steps: 2}
"""


class Plain:
    """A teacher that has no lazy signals."""

    def __init__(self, teacher: FrozenTeacher):
        self._teacher = teacher

    def signals(self, batch: Any) -> Signals:
        return self._teacher.signals(batch)


def _logits(seed: int, size: float = 3.0) -> torch.Tensor:
    return torch.randn(6, 9, generator=torch.Generator().manual_seed(seed)) * size


def _naive(logits: list[torch.Tensor], weights: list[float], mean: str, by: str) -> torch.Tensor:
    """Token by token, in float64 and in probabilities; the geometric mean through centred logits."""
    rows = []
    for token in range(len(logits[0])):
        probabilities = [one[token].double().exp() / one[token].double().exp().sum() for one in logits]
        entropies = [-sum(float(p) * float(p.log()) for p in one if p > 0) for one in probabilities]
        shares = [
            weight * (torch.tensor(-entropy).double().exp().item() if by == "confidence" else 1.0)
            for weight, entropy in zip(weights, entropies, strict=True)
        ]
        shares = [share / sum(shares) for share in shares]
        if mean == "probabilities":
            row = sum(share * one for share, one in zip(shares, probabilities, strict=True))
        else:
            centred = [one[token].double() - one[token].double().mean() for one in logits]
            total = sum(share * one for share, one in zip(shares, centred, strict=True))
            row = total.exp() / total.exp().sum()  # type: ignore[union-attr]
        rows.append(row)
    return torch.stack(rows).log()  # type: ignore[arg-type]


@every_way
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, 0.2, 5.0]], ids=str)
def test_the_mixture_is_the_mean_of_the_members(mean: Any, by: Any, weights: list[float]) -> None:
    logits = [_logits(1), _logits(2, 0.1), _logits(3, 8.0) + 100.0]
    found = mixed(logits, weights=weights, mean=mean, by=by)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), _naive(logits, weights, mean, by), atol=1e-4, rtol=1e-4)


@every_way
def test_a_mixture_of_one_opinion_is_that_opinion(mean: Any, by: Any) -> None:
    one = _logits(1)
    found = mixed([one, one + 7.0], weights=(0.1, 0.9), mean=mean, by=by)
    torch.testing.assert_close(found, one.log_softmax(-1), atol=1e-5, rtol=1e-5)


@every_way
def test_a_word_that_all_rule_out_stays_ruled_out(mean: Any, by: Any) -> None:
    muted = torch.arange(9) == 4
    logits = [_logits(seed).masked_fill(muted, -torch.inf) for seed in (1, 2)]
    found = mixed(logits, weights=(0.7, 0.3), mean=mean, by=by)
    assert (found[:, 4] == -torch.inf).all()
    rest = mixed([one[:, ~muted] for one in logits], weights=(0.7, 0.3), mean=mean, by=by)
    torch.testing.assert_close(found[:, ~muted], rest)


def test_extremes_in_bfloat16_are_finite() -> None:
    logits = [(_logits(seed).sign() * 1e4).bfloat16() for seed in (1, 2)]
    for mean, by in WAYS:
        assert mixed(logits, weights=(1.0, 1.0), mean=mean, by=by).isfinite().all()  # type: ignore[arg-type]


def test_confidence_follows_the_one_that_is_sure_at_each_token() -> None:
    """Sure at the first token and at a loss at the second, and the other way round."""
    sure, lost = torch.tensor([20.0, 0.0, 0.0]), torch.zeros(3)
    logits = [torch.stack([sure, lost]), torch.stack([lost, sure.flip(0)])]
    found = mixed(logits, weights=(1.0, 1.0), mean="probabilities", by="confidence").exp()
    # exp(-0) : exp(-log 3) = 3 : 1
    expected = torch.tensor([[0.75 + 0.25 / 3, 0.25 / 3, 0.25 / 3], [0.25 / 3, 0.25 / 3, 0.75 + 0.25 / 3]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def _ensemble(members: list[Any], width: int, mean: Any = "probabilities", by: Any = "fixed") -> EnsembleTeacher:
    return EnsembleTeacher(members, (0.7, 0.3), mean=mean, by=by, width=width)


def _loss(student: LoadedModel, teacher: Any, loss: Loss, chunk_tokens: int) -> tuple[torch.Tensor, ...]:
    """The loss of ROWS and its gradients; with ``chunk_tokens`` the logits are made so many tokens at a time."""
    batch = Collator(0, 0 if student.is_encoder_decoder else None)(ROWS)
    terms = [
        Term(name="soft", loss=loss, targets=("label", "rationale"), teacher="pair"),
        Term(name="more", loss=loss, targets=("rationale",), teacher="pair"),
    ]
    objective = Objective(terms)
    head = OutputHead(student.model, chunk_tokens=chunk_tokens) if chunk_tokens else None
    ((said, taught),) = StepByStep().compare(student.model, {"pair": teacher}, batch, objective, head)
    total, _ = objective(said, taught, objective.counts(batch))
    weights = [student.model.get_input_embeddings().weight, student.model.get_output_embeddings().weight]
    return (total.detach(), *torch.autograd.grad(total, weights))


@every_way
@pytest.mark.parametrize("loss", [ForwardKL(temperature=2.0), ReverseKL(), LogitMSE()], ids=lambda loss: loss.kind)
def test_in_chunks_it_is_what_it_is_at_once(
    tiny_model: Callable[..., LoadedModel], mean: Any, by: Any, loss: Loss
) -> None:
    """Members of other sizes and precisions, the second with a padded head, or without lazy signals."""
    wide = {"d_model": 24} if tiny_model().is_encoder_decoder else {"hidden_size": 24}
    student, first, second = tiny_model(seed=1), tiny_model(seed=2, **wide), tiny_model(seed=3, vocab_size=80)
    words = len(student.tokenizer)
    # In bfloat16 a head may round a chunk a little otherwise than the whole.
    one = FrozenTeacher(first.model.bfloat16(), words)
    for other in (FrozenTeacher(second.model, words), Plain(FrozenTeacher(second.model))):
        teacher = _ensemble([one, other], words, mean, by)
        expected = _loss(student, teacher, loss, 0)
        assert expected[0] > 1e-4
        for chunk_tokens in (1, 3, 100):
            for found, wanted in zip(_loss(student, teacher, loss, chunk_tokens), expected, strict=True):
                torch.testing.assert_close(found, wanted, atol=1e-4, rtol=2e-2)
                assert (found - wanted).norm() <= 1e-2 * wanted.norm()


def test_it_says_the_mixture_and_passes_no_gradient_on(tiny_model: Callable[..., LoadedModel]) -> None:
    student, first, second = (tiny_model(seed=seed) for seed in (1, 2, 3))
    words = len(student.tokenizer)
    members = [FrozenTeacher(one.model, words) for one in (first, second)]
    batch = Collator(0, 0 if student.is_encoder_decoder else None)(ROWS)
    said = _ensemble(members, words).signals(batch)
    each = [member.signals(batch) for member in members]
    torch.testing.assert_close(
        said.logits.exp(), 0.7 * each[0].logits.softmax(-1) + 0.3 * each[1].logits.softmax(-1), atol=1e-6, rtol=1e-5
    )
    assert said.token_ids.tolist() == each[0].token_ids.tolist()
    assert not said.logits.requires_grad
    for chunk_tokens in (0, 2):
        _, *gradients = _loss(student, _ensemble(members, words), ForwardKL(), chunk_tokens)
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
        assert all(weight.grad is None for one in (first, second) for weight in one.model.parameters())


def _saved(model: LoadedModel, folder: Path) -> None:
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def test_members_are_opened_once_and_counted_as_often_as_they_run(
    tiny_llama: Callable[..., LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`a` works twice in `all`: by itself, and in `pair`."""
    from distill_llm.models import load

    student, a, b = tiny_llama(seed=1), tiny_llama(seed=2), tiny_llama(seed=3, intermediate_size=64)
    _saved(a, tmp_path / "a")
    _saved(b, tmp_path / "b")
    loaded, really = [], load.load_on
    monkeypatch.setattr(load, "load_on", lambda *of, **options: loaded.append(of[1]) or really(*of, **options))
    recipe = recipe_from(parse_yaml(YAML.replace("FOLDER", str(tmp_path)), "test"), ())
    opened = open_teachers(recipe, recipe.objective, student)
    assert sorted(opened) == ["a", "all", "b", "own", "pair"]
    assert sorted(loaded) == [str(tmp_path / "a"), str(tmp_path / "b")]
    sizes = {name: spec.num_parameters(student.num_parameters) for name, spec in recipe.teachers.items()}
    own = {"a": a.num_parameters, "b": b.num_parameters, "own": student.num_parameters}
    assert sizes == own | {"pair": 0, "all": 0}
    assert sorted(with_members(recipe.teachers, "pair")) == ["a", "b", "pair"]
    assert sorted(with_members(recipe.teachers, "all")) == ["a", "a", "all", "b", "own", "pair"]

    batch = Collator(0, None)(ROWS)
    p = {name: teacher.signals(batch).logits.softmax(-1) for name, teacher in opened.items()}
    torch.testing.assert_close(p["pair"], 0.75 * p["b"] + 0.25 * p["a"])  # weights are those of `of`, in its order
    torch.testing.assert_close(p["all"], (p["pair"] + p["a"] + p["own"]) / 3)


def test_teachers_that_no_term_needs_are_not_opened(tiny_llama: Callable[..., LoadedModel], tmp_path: Path) -> None:
    student = tiny_llama(seed=1)
    _saved(tiny_llama(seed=2), tmp_path / "a")
    recipe = recipe_from(parse_yaml(YAML.replace("FOLDER", str(tmp_path)), "test"), ())
    terms = [recipe.objective[0].model_copy(update={"teacher": "a"})]
    assert list(open_teachers(recipe, terms, student)) == ["a"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"of": ["a"]}, "at least 2 items"),
        ({"of": ["a", "a"]}, "a teacher is named twice"),
        ({"weights": [1.0]}, r"`weights` has 1 numbers for 2 teachers \['a', 'b'\]"),
        ({"weights": [1.0, 0.0]}, "greater than 0"),
        ({"weights": [1.0, float("inf")]}, "finite"),
        ({"mean": "median"}, "'probabilities' or 'logits'"),
    ],
    ids=str,
)
def test_what_is_no_ensemble_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Ensemble.model_validate({"of": ["a", "b"]} | wrong)
