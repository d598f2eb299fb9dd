"""Losses on layers: each beside its own formula in float64, then inside a training, however a step is cut."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from distill_llm.core.component import kinds
from distill_llm.core.errors import ConfigError, Interrupted, StorageError
from distill_llm.core.features import Features, Shape
from distill_llm.core.signals import tokens_of
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.losses.attention_map import AttentionMap
from distill_llm.losses.cosine import Cosine
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.losses.hint import Hint
from distill_llm.losses.layers import FeatureLoss, HiddenLoss
from distill_llm.losses.relational import Relational
from distill_llm.models.head import OutputHead
from distill_llm.models.layers import add_heads, heads_of, shapes_of, show_attention
from distill_llm.objective import Objective, Term
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.frozen import FrozenTeacher

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distill_llm.models.load import LoadedModel

LAYERS = [Hint(), Cosine(), Relational(), Relational(relation="angle"), AttentionMap()]
HIDDEN = [loss for loss in LAYERS if isinstance(loss, HiddenLoss)]
every_layer_loss = pytest.mark.parametrize("loss", LAYERS, ids=repr)
every_hidden_loss = pytest.mark.parametrize("loss", HIDDEN, ids=repr)
ROWS_OF_TOKENS = [0, 0, 0, 0, 1, 2, 2]  # of a batch: four tokens in one row, one in another, two in a third


def _maps(seed: int, heads: int, tokens: int = 7, keys: int = 5, scale: float = 1.0) -> torch.Tensor:
    logits = scale * torch.randn(tokens, heads, keys, generator=torch.Generator().manual_seed(seed))
    return logits.softmax(-1)


def _features(seed: int, width: int = 6, heads: int = 2, layers: int = 2, scale: float = 1.0) -> Features:
    drawn = torch.Generator().manual_seed(seed)
    rows = torch.tensor(ROWS_OF_TOKENS)
    return Features(
        rows=rows,
        targets=torch.zeros_like(rows),
        hidden=tuple(scale * torch.randn(7, width, generator=drawn) for _ in range(layers + 1)),
        attention={"self": tuple(_maps(seed + n, heads) for n in range(layers))},
    )


def test_every_loss_on_layers_is_tested_here() -> None:
    assert {type(loss) for loss in LAYERS} == set(kinds(FeatureLoss, "distill_llm.losses").values())


@every_layer_loss
def test_it_is_zero_for_equals_and_positive_otherwise(loss: FeatureLoss) -> None:
    same = loss(_features(1), _features(1))
    torch.testing.assert_close(same, torch.zeros(7), atol=1e-6, rtol=0)
    other = loss(_features(1), _features(5))
    assert other.shape == (7,)
    assert other.dtype == torch.float32
    assert (other >= 0).all()
    assert other.sum() > 0.01


@every_hidden_loss
def test_only_the_student_gets_a_gradient_and_it_is_finite(loss: HiddenLoss) -> None:
    student, teacher = _features(1), _features(2)
    for states in (*student.hidden, *teacher.hidden):
        states.requires_grad_()
    loss(student, teacher).sum().backward()
    gradient = student.hidden[-1].grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    assert all(states.grad is None for states in teacher.hidden)


@every_layer_loss
def test_it_is_finite_in_bfloat16_at_states_of_ten_thousand(loss: FeatureLoss) -> None:
    """And where two tokens have the same state, whose distance has no direction."""
    student, teacher = _features(1, scale=1e4), _features(2, scale=1e4)
    student.hidden[-1][1] = student.hidden[-1][0]

    def low(features: Features) -> Features:
        return Features(
            features.rows,
            features.targets,
            tuple(states.bfloat16().requires_grad_() for states in features.hidden),
            {"self": tuple(_maps(3 + n, 2, scale=300.0).bfloat16().requires_grad_() for n in range(2))},
        )

    mine = low(student)
    found = loss(mine, low(teacher))
    assert found.isfinite().all()
    found.sum().backward()
    for states in (*mine.hidden, *mine.attention["self"]):
        assert states.grad is None or states.grad.isfinite().all()


def test_hint_is_the_mean_square_and_cosine_one_minus_the_cosine() -> None:
    student, teacher = _features(1), _features(2)
    s, t = student.hidden[-1].double(), teacher.hidden[-1].double()
    squares = [sum((s[n, d] - t[n, d]) ** 2 for d in range(6)) / 6 for n in range(7)]
    torch.testing.assert_close(Hint()(student, teacher).double(), torch.stack(squares), atol=1e-6, rtol=1e-5)
    angles = [1 - (s[n] @ t[n]) / (s[n] @ s[n]).sqrt() / (t[n] @ t[n]).sqrt() for n in range(7)]
    torch.testing.assert_close(Cosine()(student, teacher).double(), torch.stack(angles), atol=1e-6, rtol=1e-5)


def _huber(gap: float) -> float:
    return gap * gap / 2 if abs(gap) < 1 else abs(gap) - 0.5


def test_relational_compares_distances_within_a_row() -> None:
    """By the formula of Park et al. 2019, token by token, in plain Python."""
    student, teacher = _features(1), _features(2)
    expected = []
    for n, row in enumerate(ROWS_OF_TOKENS):
        members = [m for m, other in enumerate(ROWS_OF_TOKENS) if other == row]
        if len(members) < 2:
            expected.append(0.0)
            continue
        relations = []
        for states in (student.hidden[-1].double(), teacher.hidden[-1].double()):
            far = {(a, b): float((states[a] - states[b]).norm()) for a in members for b in members if a != b}
            mean = sum(far.values()) / len(far)
            relations.append({m: far[n, m] / mean for m in members if m != n})
        gaps = [_huber(relations[0][m] - relations[1][m]) for m in relations[0]]
        expected.append(sum(gaps) / len(gaps))
    found = Relational()(student, teacher)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_relational_compares_angles_within_a_row() -> None:
    student, teacher = _features(1), _features(2)
    expected = []
    for n, row in enumerate(ROWS_OF_TOKENS):
        others = [m for m, other in enumerate(ROWS_OF_TOKENS) if other == row and m != n]
        gaps = []
        for a in others:
            for b in others:
                if a == b:
                    continue
                cosines = []
                for states in (student.hidden[-1].double(), teacher.hidden[-1].double()):
                    one, two = states[a] - states[n], states[b] - states[n]
                    cosines.append(float(one @ two / one.norm() / two.norm()))
                gaps.append(_huber(cosines[0] - cosines[1]))
        expected.append(sum(gaps) / len(gaps) if gaps else 0.0)
    found = Relational(relation="angle")(student, teacher)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [2, 3])
def test_attention_map_is_the_divergence_of_each_head_or_of_their_means(heads: int) -> None:
    student, teacher = _features(1), _features(2, heads=heads)
    q, p = student.attention["self"][-1].double(), teacher.attention["self"][-1].double()
    if heads != 2:
        q, p = q.mean(1, keepdim=True), p.mean(1, keepdim=True)
    expected = functional.kl_div(q.log(), p, reduction="none").sum(-1).mean(1)
    torch.testing.assert_close(AttentionMap()(student, teacher).double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "pairs"),
    [
        ("last", 2, 6, [(2, 6)]),
        ("uniform", 3, 12, [(1, 4), (2, 8), (3, 12)]),
        ("uniform", 2, 2, [(1, 1), (2, 2)]),
        ("uniform", 4, 2, [(1, 1), (2, 1), (3, 2), (4, 2)]),
        ("lower_half", 4, 12, [(1, 3), (2, 6)]),
        ("lower_half", 5, 5, [(1, 1), (2, 2)]),
        ("lower_half", 1, 3, [(1, 3)]),
        ([[0, 0], [1, 5]], 2, 6, [(0, 0), (1, 5)]),
    ],
)
def test_layers_are_mapped(layers: Any, student: int, teacher: int, pairs: list[tuple[int, int]]) -> None:
    assert Hint.model_validate({"layers": layers}).pairs(student, teacher) == pairs


@pytest.mark.parametrize("layers", [[], [[1]], [1, 2], [["a", "b"]], 3], ids=repr)
def test_what_is_no_pair_of_layers_is_one_error(layers: Any) -> None:
    with pytest.raises(ValidationError, match=r"1 validation error(?s:.*)names no pairs of layers"):
        Hint.model_validate({"layers": layers})


def test_a_row_counts_as_much_as_its_votes_agreed() -> None:
    student, teacher = _features(1), _features(2)
    agreement = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0, 0.25, 0.25])
    term = Term(name="hint", loss=Hint(), targets=("label",), teacher="big", row_weight="agreement")
    plain = Hint()(student, teacher)
    torch.testing.assert_close(term.of_each(replace(student, agreement=agreement), teacher), plain * agreement)


def test_a_mean_is_taken_over_pairs_of_layers() -> None:
    student, teacher = _features(1), _features(2)
    both = Hint(layers=((1, 2), (2, 1)))(student, teacher)
    each = [Hint(layers=(pair,))(student, teacher) for pair in ((1, 2), (2, 1))]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_widths_ask_for_heads_only_where_they_differ() -> None:
    assert Hint(layers="uniform").widths(Shape(2, 8), Shape(4, 16)) == [(8, 16), (8, 16)]
    assert Cosine().widths(Shape(2, 16), Shape(4, 16)) == []
    assert Relational().widths(Shape(2, 8), Shape(4, 16)) == []
    with pytest.raises(ConfigError, match="layer 3 of the student"):
        Hint(layers=((3, 1),)).widths(Shape(2, 8), Shape(4, 8))


ROWS = [
    Row(0, "label", [5, 6, 7], [8, 1]),
    Row(0, "rationale", [5, 6], [9, 10, 11, 12, 13, 1]),
    Row(1, "label", [6, 5], [7, 1]),
    Row(1, "rationale", [7, 9, 5, 6], [9, 8, 1]),
]


def _deep_terms(is_encoder_decoder: bool) -> list[Term]:
    about: dict[str, Any] = {"teacher": "big", "targets": ("label", "rationale")}
    terms = [
        Term(name="label", loss=CrossEntropy(), targets=("label",)),
        Term(name="hint", loss=Hint(layers="uniform"), teacher="big", targets=("rationale",), weight=0.5),
        Term(name="cosine", loss=Cosine(), **about),
        Term(name="relational", loss=Relational(layers=((1, 1),)), **about),
        Term(name="looks", loss=AttentionMap(), **about),
    ]
    if is_encoder_decoder:
        terms += [
            Term(name="read", loss=Hint(of="encoder"), **about),
            Term(name="cross", loss=AttentionMap(of="cross"), teacher="big", targets=("label",)),
            Term(name="enc", loss=AttentionMap(of="encoder", layers="uniform"), **about),
        ]
    return terms


def _prepared(student: LoadedModel, teacher: LoadedModel, objective: Objective) -> FrozenTeacher:
    """As pipeline/trial.py does it."""
    from distill_llm.pipeline.trial import _open_layers

    frozen = FrozenTeacher(teacher.model)
    torch.manual_seed(3)
    _open_layers(student.model, {"big": frozen}, objective)
    return frozen


def _collator(student: LoadedModel, *, laid_out: bool = False) -> Collator:
    """``laid_out``: in parts that read each input once, or packed."""
    if student.is_encoder_decoder:
        return Collator(0, student.model.config.decoder_start_token_id, part_tokens=12 if laid_out else 0)
    return Collator(0, None, packs=laid_out)


def _update(
    student: LoadedModel,
    frozen: FrozenTeacher,
    objective: Objective,
    cuts: list[list[Row]],
    *,
    chunked: bool,
    laid_out: bool = False,
) -> dict[str, torch.Tensor]:
    """Gradients of one step."""
    model = copy.deepcopy(student.model).eval()
    collate = _collator(student, laid_out=laid_out)
    whole = collate(ROWS)
    head = OutputHead(model, chunk_tokens=2) if chunked else None
    for rows in cuts:
        ((said, taught),) = StepByStep().compare(model, {"big": frozen}, collate(rows), objective, head)
        loss, _ = objective(said, taught, objective.counts(whole))
        loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


CUTS = [[ROWS], [ROWS[:1], ROWS[1:]], [[row] for row in ROWS], [[ROWS[1], ROWS[3]], [ROWS[0], ROWS[2]]]]


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("width", ["same", "other"])
def test_gradients_do_not_depend_on_the_cut_nor_on_chunks(
    family: str, width: str, request: pytest.FixtureRequest
) -> None:
    build: Callable[..., LoadedModel] = request.getfixturevalue(f"tiny_{family}")
    student, teacher = build(seed=1), _wider(build, family) if width == "other" else build(seed=2)
    objective = Objective(_deep_terms(student.is_encoder_decoder))
    frozen = _prepared(student, teacher, objective)
    assert set(heads_of(student.model)) == (set() if width == "same" else _headed(student))
    first = _update(student, frozen, objective, CUTS[0], chunked=False)
    flat = Objective([term for term in objective.terms if not isinstance(term.loss, AttentionMap)])
    plain = _update(student, frozen, flat, CUTS[0], chunked=False)
    for cuts in CUTS:  # no attention is read, so that the batches go through as they are laid out
        other = _update(student, frozen, flat, cuts, chunked=True, laid_out=True)
        for name, gradient in plain.items():
            torch.testing.assert_close(other[name], gradient, atol=3e-6, rtol=1e-3, msg=name)
    assert any("hint_heads" in name for name in first) == (width == "other")
    for cuts in CUTS:
        for chunked in (False, True):
            other = _update(student, frozen, objective, cuts, chunked=chunked, laid_out=chunked)
            assert other.keys() == first.keys()
            for name, gradient in first.items():
                torch.testing.assert_close(other[name], gradient, atol=3e-6, rtol=1e-3, msg=name)


def _headed(student: LoadedModel) -> set[str]:
    return {"hint", "cosine", "read"} if student.is_encoder_decoder else {"hint", "cosine"}


def _wider(build: Callable[..., LoadedModel], family: str) -> LoadedModel:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    small = build(seed=2)
    config = copy.deepcopy(small.model.config)
    sizes = {"t5": {"d_model": 24, "num_layers": 4, "num_decoder_layers": 4}, "llama": {"hidden_size": 24}}
    for name, size in sizes[family].items():
        setattr(config, name, size)
    torch.manual_seed(2)
    cls = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    return type(small)(cls.from_config(config), small.tokenizer)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_hint_is_the_mean_square_of_the_models_own_states(family: str, request: pytest.FixtureRequest) -> None:
    """With equal widths and the last layers: read off plain forward passes, by hand."""
    build: Callable[..., LoadedModel] = request.getfixturevalue(f"tiny_{family}")
    student, teacher = build(seed=1), build(seed=2)
    objective = Objective([Term(name="hint", loss=Hint(), teacher="big", targets=("label", "rationale"))])
    frozen = _prepared(student, teacher, objective)
    batch = _collator(student)(ROWS)
    student.model.eval()
    head = OutputHead(student.model)
    ((said, taught),) = StepByStep().compare(student.model, {"big": frozen}, batch, objective, head)
    loss, _ = objective(said, taught, objective.counts(batch))
    inputs = {name: column for name, column in batch.items() if name.endswith(("_ids", "_mask"))}
    states = []
    for one in (student, teacher):
        out = one.model.eval()(**inputs, output_hidden_states=True)
        states.append(out.decoder_hidden_states[-1] if student.is_encoder_decoder else out.hidden_states[-1])
    labels = batch["labels"]
    total, count = 0.0, 0
    for row in range(labels.size(0)):
        for place in range(labels.size(1)):
            if labels[row, place] == -100:
                continue
            at = place if student.is_encoder_decoder else place - 1
            total += (states[0][row, at] - states[1][row, at]).detach().double().square().mean().item()
            count += 1
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_attention_is_shown_without_dropout(tiny_llama: Callable[..., LoadedModel]) -> None:
    student = tiny_llama(seed=1)
    for layer in student.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    show_attention(student.model, ["self"], where="student")
    batch = Collator(0, None)(ROWS)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    maps = student.model.train()(**inputs, output_attentions=True).attentions
    torch.testing.assert_close(maps[-1].sum(-1), torch.ones_like(maps[-1].sum(-1)), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="decoder-only"):
        show_attention(student.model, ["cross"], where="student")


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (Hint(of="encoder"), r"objective\.deep\.loss: it looks at an encoder, and the student is decoder-only"),
        (AttentionMap(of="cross"), "decoder-only, and has no"),
        (Cosine(layers=((1, 9),)), r"objective\.deep\.loss\.layers: .* layer 9 of the teacher"),
    ],
    ids=["encoder", "cross", "layer"],
)
def test_what_a_model_does_not_have_is_refused(
    loss: FeatureLoss, what: str, tiny_llama: Callable[..., LoadedModel]
) -> None:
    objective = Objective([Term(name="deep", loss=loss, targets=("label",), teacher="big")])
    with pytest.raises(ConfigError, match=what):
        _prepared(tiny_llama(seed=1), tiny_llama(seed=2), objective)


def test_shapes_are_those_of_the_config(tiny_t5: Callable[..., LoadedModel]) -> None:
    model = tiny_t5(seed=1).model
    shapes = shapes_of(model)
    assert shapes["encoder"] == Shape(model.config.num_layers, model.config.d_model)
    assert shapes["decoder"] == Shape(model.config.num_decoder_layers, model.config.d_model)


@pytest.mark.parametrize("until", [1.0, 0.5])
def test_heads_are_trained_resumed_and_left_out_of_the_model(
    until: float, tiny_t5: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    from safetensors.torch import load_file
    from transformers import set_seed

    from distill_llm.training.train import fit, make_trainer

    terms = [
        Term(name="label", loss=CrossEntropy(), targets=("label",)),
        Term(name="hint", loss=Hint(), teacher="big", targets=("label", "rationale"), until=until),
    ]

    def trained(name: str, stop_at: int = 0) -> tuple[dict[str, torch.Tensor], Any]:
        set_seed(17)
        student, teacher = tiny_t5(seed=5), _wider(tiny_t5, "t5")
        frozen = _prepared(student, teacher, Objective(terms))
        keys: dict[str, Any] = {"max_steps": 4, "rows_per_step": 4, "rows_per_batch": 2, "learning_rate": 1e-2}
        trainer = make_trainer(
            student,
            ROWS,
            spec=TrainSpec.model_validate(keys | {"validate_every": 2}),
            max_steps=4,
            scheme=StepByStep(),
            objective=Objective(terms),
            teachers={"big": frozen},
            validate=None,
            folder=tmp_path / name,
            seed=17,
        )
        steps = iter(range(1, 100))
        fit(trainer, tmp_path / name, stop_when=lambda: next(steps) == stop_at)
        return {key: weight.detach().clone() for key, weight in student.model.named_parameters()}, student

    fresh = tiny_t5(seed=5)
    straight, student = trained("straight")
    assert "hint_heads.hint.0.weight" in straight
    with pytest.raises(Interrupted):
        trained("parts", stop_at=2)
    resumed, _ = trained("parts")
    for name, weight in straight.items():
        assert torch.equal(resumed[name], weight), name
    saved = load_file(tmp_path / "straight" / "model" / "model.safetensors")
    assert not [name for name in saved if "hint_heads" in name]
    again = type(student.model).from_pretrained(tmp_path / "straight" / "model")
    assert any(not torch.equal(weight, fresh.model.state_dict()[name]) for name, weight in again.state_dict().items())
    for name, weight in again.state_dict().items():
        torch.testing.assert_close(weight, student.model.state_dict()[name])


def test_a_checkpoint_without_the_heads_is_refused(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    from distill_llm.models.layers import load_heads

    student = tiny_t5(seed=5)
    load_heads(student.model, tmp_path)  # nothing to load
    add_heads(student.model, {"hint": [(16, 24)]})
    with pytest.raises(StorageError, match="lacks the hint heads"):
        load_heads(student.model, tmp_path)


def test_the_order_of_tokens_is_that_of_the_logits(tiny_t5: Callable[..., LoadedModel]) -> None:
    """Features of a batch of two targets, row by row and target by target, beside the place of each token."""
    student = tiny_t5(seed=1)
    objective = Objective(_deep_terms(True)[1:3])
    _prepared(student, tiny_t5(seed=2), objective)
    batch = _collator(student)(ROWS)
    said = OutputHead(student.model).read(student.model, batch, objective.reading())
    tokens = tokens_of(batch)
    assert torch.equal(said.features["decoder"].rows, tokens.rows)
    assert torch.equal(said.features["decoder"].targets, tokens.targets)
    assert math.prod(said.features["decoder"].hidden[-1].shape) == len(tokens.rows) * 16
