"""Several learners in one training: peers that teach each other, exits of one student. Losses against formulas, updates
against their micro-batches, and identities to the bit."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import set_seed

from distill_llm.core.errors import Interrupted, StorageError
from distill_llm.core.example import TARGETS
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.models.load import LoadedModel
from distill_llm.models.peers import Peers
from distill_llm.objective import Objective, Term
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.mutual import Mutual
from distill_llm.schemes.self_distill import SelfDistill
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.ema import EmaTeacher
from distill_llm.teachers.frozen import FrozenTeacher
from distill_llm.training.train import fit, make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from distill_llm.schemes.base import Scheme
    from distill_llm.training.trainer import DistillTrainer

TEMPERATURE = 2.0
ROWS = [
    row
    for example in range(4)
    for row in (
        Row(example, "label", [*range(5, 8 + example)], [8 + example, 1]),
        Row(example, "rationale", [*range(6, 10 + example)], [*range(9, 13 + 3 * example), 1]),
    )
]
HARD = [
    Term(name="label", loss=CrossEntropy(), targets=("label",)),
    Term(name="rationale", loss=CrossEntropy(), targets=("rationale",), weight=0.5),
]
BIG = Term(name="big", loss=ForwardKL(), targets=("label",), teacher="big", weight=0.3)


def _soft(teacher: str) -> Term:
    loss = ForwardKL(temperature=TEMPERATURE)
    return Term(name="soft", loss=loss, targets=("label", "rationale"), teacher=teacher, weight=0.7)


def _peers(build: Callable[..., LoadedModel], count: int, **sizes: Any) -> LoadedModel:
    """The last of them is wider."""
    family = build().model.config.model_type
    wide = {"d_model": 24} if family == "t5" else {"hidden_size": 24}
    found = [build(seed=11 + number, **sizes, **(wide if 0 < number == count - 1 else {})) for number in range(count)]
    names = {f"peer_{number}": one.model for number, one in enumerate(found, start=1)}
    return LoadedModel(Peers(names, width=len(found[0].tokenizer)), found[0].tokenizer)


def _deep(build: Callable[..., LoadedModel], **sizes: Any) -> LoadedModel:
    """Three layers, which say different things: a fresh model's exits hardly do."""
    family = build().model.config.model_type
    student = build(seed=11, **({"num_layers": 3} if family == "t5" else {"num_hidden_layers": 3}), **sizes)
    with torch.no_grad():
        for weight in student.model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return student


def _trainer(
    scheme: Scheme, student: LoadedModel, terms: list[Term], folder: Path, teachers: Mapping[str, Any] = {}, **spec: Any
) -> DistillTrainer:
    set_seed(17)
    keys = {"max_steps": 1, "rows_per_step": 8, "rows_per_batch": 8, "schedule": "constant", "learning_rate": 1e-2}
    made = TrainSpec.model_validate(keys | spec)
    return make_trainer(
        student,
        ROWS,
        spec=made,
        max_steps=made.max_steps,
        scheme=scheme,
        objective=Objective(terms),
        teachers=teachers,
        validate=None,
        folder=folder,
        seed=17,
    )


def _logits(model: Any, row: Row) -> torch.Tensor:
    """Of the label tokens of one row, as transformers gives them."""
    labels = list(row.label_ids)
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id, *labels[:-1]]
        return model(input_ids=torch.tensor([row.input_ids]), decoder_input_ids=torch.tensor([start])).logits[0]
    whole = model(input_ids=torch.tensor([[*row.input_ids, *labels]])).logits[0]
    return whole[len(row.input_ids) - 1 : -1]


def _mean_over_tokens(of_row: Callable[[Row], torch.Tensor], target: str | None = None) -> torch.Tensor:
    return torch.cat([of_row(row) for row in ROWS if target in (None, row.target)]).mean()


def _hard_and_soft(said: Callable[[Row], torch.Tensor], taught: Callable[[Row], torch.Tensor] | None) -> torch.Tensor:
    """The objective of one learner, written out in float64; ``taught`` gives probabilities at the temperature."""

    def hard(row: Row) -> torch.Tensor:
        log_q = said(row).log_softmax(-1)
        return -log_q[torch.arange(len(row.label_ids)), torch.tensor(row.label_ids)]

    def soft(row: Row) -> torch.Tensor:
        assert taught is not None
        p, log_q = taught(row).detach(), (said(row) / TEMPERATURE).log_softmax(-1)
        return TEMPERATURE**2 * (p * (p.log() - log_q)).sum(-1)

    total = _mean_over_tokens(hard, "label") + 0.5 * _mean_over_tokens(hard, "rationale")
    return total if taught is None else total + 0.7 * _mean_over_tokens(soft)


def _peers_formula(peers: list[Any]) -> torch.Tensor:
    """Each learns from the mean of the others' probabilities, which the temperature softens afterwards."""

    def taught(number: int, row: Row) -> torch.Tensor:
        others = [_logits(one, row).softmax(-1) for other, one in enumerate(peers) if other != number]
        return (torch.stack(others).mean(0).log() / TEMPERATURE).softmax(-1)

    def of(number: int) -> torch.Tensor:
        return _hard_and_soft(lambda row: _logits(peers[number], row), lambda row: taught(number, row))

    return torch.stack([of(number) for number in range(len(peers))]).sum()


def _exit_logits(model: Any, row: Row, layers: int) -> torch.Tensor:
    """By hand: the states behind so many layers, through the last norm, T5's scale, and the head."""
    kept: list[torch.Tensor] = []
    is_t5 = model.config.is_encoder_decoder
    blocks, norm = (
        (model.decoder.block, model.decoder.final_layer_norm) if is_t5 else (model.model.layers, model.model.norm)
    )

    def keep(_: Any, __: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    hook = blocks[layers - 1].register_forward_hook(keep)
    labels = _logits(model, row).size(0)
    hook.remove()
    states = norm(kept[0])[0]
    if is_t5 and model.config.scale_decoder_outputs:
        states = states * model.config.d_model**-0.5
    logits = model.lm_head(states)
    return logits if is_t5 else logits[len(row.input_ids) - 1 : len(row.input_ids) - 1 + labels]


def _exits_formula(model: Any, exits: tuple[int, ...], weight: float) -> torch.Tensor:
    def deepest(row: Row) -> torch.Tensor:
        return (_logits(model, row) / TEMPERATURE).softmax(-1)

    total = _hard_and_soft(lambda row: _logits(model, row), None)
    for layers in exits:
        total = total + weight * _hard_and_soft(lambda row, at=layers: _exit_logits(model, row, at), deepest)
    return total


MUTUAL, EXITS = Mutual(peers=3), SelfDistill(exits=(1, 2), exit_weight=0.6)


def _start(scheme: Scheme, build: Callable[..., LoadedModel]) -> tuple[LoadedModel, list[Term]]:
    if isinstance(scheme, Mutual):
        return _peers(build, 3), [*HARD, _soft("peers")]
    return _deep(build), [*HARD, _soft("deepest")]


def _formula(scheme: Scheme, model: Any) -> torch.Tensor:
    return _peers_formula(list(model.peers)) if isinstance(scheme, Mutual) else _exits_formula(model, (1, 2), 0.6)


@pytest.mark.parametrize("chunk_tokens", [3, 0])
@pytest.mark.parametrize("scheme", [MUTUAL, EXITS], ids=["mutual", "exits"])
def test_loss_and_gradient_are_those_of_the_formula(
    tiny_model: Callable[..., LoadedModel], scheme: Scheme, chunk_tokens: Any, tmp_path: Path
) -> None:
    """One optimiser step's loss, all learners summed, against float64; teachers get no gradient."""
    student, terms = _start(scheme, tiny_model)
    exact = copy.deepcopy(student.model).double().eval()
    expected = _formula(scheme, exact)
    expected.backward()
    trainer = _trainer(scheme, student, terms, tmp_path, chunk_tokens=chunk_tokens, packing="auto")
    ours = trainer.compute_loss(student.model, trainer.collator(ROWS))
    ours.backward()
    torch.testing.assert_close(ours.detach().double(), expected.detach(), atol=1e-5, rtol=1e-5)
    wanted = dict(exact.named_parameters())
    for name, weight in student.model.named_parameters():
        assert weight.grad is not None, name
        torch.testing.assert_close(weight.grad.double(), wanted[name].grad, atol=2e-5, rtol=1e-3)
    assert max(weight.grad.abs().max() for weight in wanted.values() if weight.grad is not None) > 0.05


@pytest.mark.parametrize("scheme", [MUTUAL, EXITS], ids=["mutual", "exits"])
def test_the_update_does_not_depend_on_the_micro_batches(
    tiny_model: Callable[..., LoadedModel], scheme: Scheme, tmp_path: Path
) -> None:
    """Eight rows at once, and in twos, fours and eights; with a frozen teacher beside."""
    start, terms = _start(scheme, tiny_model)
    start.model.double()
    teachers = {"big": FrozenTeacher(tiny_model(seed=8).model.double(), len(start.tokenizer))}
    after = {}
    for rows in (8, 4, 2, 1):
        student = LoadedModel(copy.deepcopy(start.model), start.tokenizer)
        trainer = _trainer(
            scheme, student, [*terms, BIG], tmp_path / str(rows), teachers, rows_per_batch=rows, max_grad_norm=0.5
        )
        assert trainer.args.gradient_accumulation_steps == 8 // rows
        trainer.train()
        after[rows] = dict(student.model.named_parameters())
    for name, weight in after[8].items():
        for rows in (4, 2, 1):
            torch.testing.assert_close(after[rows][name], weight, atol=1e-6, rtol=0, msg=f"{name}, {rows} rows")
    begun = dict(start.model.named_parameters())
    assert max((weight - begun[name]).abs().max() for name, weight in after[8].items()) > 5e-3


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def _same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


SEVERAL = {"max_steps": 4, "rows_per_step": 4, "rows_per_batch": 2, "validate_every": 2, "max_grad_norm": 0.3}


def test_one_peer_is_plain_training_to_the_bit(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Dropout, clipping and checkpoints included; terms against peers fall away, for there are none."""
    dropout = {"dropout_rate": 0.2} if tiny_model().is_encoder_decoder else {"attention_dropout": 0.2}
    plain, alone = tiny_model(seed=11, **dropout), _peers(tiny_model, 1, **dropout)
    start = _weights(plain.model)
    assert _same(_weights(alone.model.peers[0]), start)
    fit(_trainer(StepByStep(), plain, HARD, tmp_path / "plain", **SEVERAL), tmp_path / "plain")
    trained = fit(
        _trainer(Mutual(peers=1), alone, [*HARD, _soft("peers")], tmp_path / "one", **SEVERAL), tmp_path / "one"
    )
    assert _same(_weights(alone.model.peers[0]), _weights(plain.model))
    assert not _same(_weights(plain.model), start)
    assert (trained.learner, trained.others) == ("peer_1", {})
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / way / "model").iterdir() if path.suffix == ".safetensors"}
        for way in ("plain", "one")
    ]
    assert files[0] == files[1]
    assert files[0]


def test_peers_that_do_not_talk_learn_as_if_they_were_alone(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """To the bit: gradients are clipped peer by peer, and one optimiser's step is each one's own."""
    both = _peers(tiny_model, 2)
    alone = [LoadedModel(copy.deepcopy(peer), both.tokenizer) for peer in both.model.peers]
    fit(_trainer(Mutual(), both, HARD, tmp_path / "both", **SEVERAL), tmp_path / "both")
    for number, one in enumerate(alone):
        fit(_trainer(StepByStep(), one, HARD, tmp_path / str(number), **SEVERAL), tmp_path / str(number))
        assert _same(_weights(both.model.peers[number]), _weights(one.model))


def test_the_deepest_layer_learns_nothing_from_its_exits_term(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """The term against `deepest` alone leaves the layers behind the last exit without a gradient."""
    student = _deep(tiny_model)
    trainer = _trainer(SelfDistill(exits=(1,)), student, [*HARD, _soft("deepest")], tmp_path)
    objective = trainer.scheme.for_learners(Objective([_soft("deepest")]))
    batch = trainer.collator(ROWS)
    pairs = trainer.scheme.compare(student.model, {}, batch, objective, trainer._head)
    losses = [
        objective(*pair, objective.counts(batch), learner=name)[0]
        for name, pair in zip(trainer.scheme.learners, pairs, strict=True)
    ]
    torch.stack(losses).sum().backward()
    is_t5 = student.is_encoder_decoder
    layers = student.model.decoder.block if is_t5 else student.model.model.layers
    pushed = [max(weight.grad.abs().max().item() for weight in layer.parameters()) for layer in layers]
    assert pushed[0] > 1e-3
    assert pushed[1:] == [0.0, 0.0]


@pytest.mark.parametrize("scheme", [Mutual(), SelfDistill(exits=(1,))], ids=["mutual", "exits"])
def test_interrupted_and_resumed_is_uninterrupted_to_the_bit(
    tiny_t5: Callable[..., LoadedModel], scheme: Scheme, tmp_path: Path
) -> None:
    """With dropout; the exits with an average of the whole student as a further teacher."""

    def build() -> tuple[LoadedModel, list[Term], dict[str, Any]]:
        if isinstance(scheme, Mutual):
            return _peers(tiny_t5, 2, dropout_rate=0.2), [*HARD, _soft("peers")], {}
        student = _deep(tiny_t5, dropout_rate=0.2)
        own = EmaTeacher(student.model, len(student.tokenizer), decay=0.7)
        return student, [*HARD, _soft("deepest"), BIG], {"big": own}

    whole, terms, teachers = build()
    fit(_trainer(scheme, whole, terms, tmp_path / "whole", teachers, **SEVERAL), tmp_path / "whole")
    stopped, _, teachers = build()
    steps = iter(range(1, 100))
    trainer = _trainer(scheme, stopped, terms, tmp_path / "parts", teachers, **SEVERAL)
    with pytest.raises(Interrupted):
        fit(trainer, tmp_path / "parts", stop_when=lambda: next(steps) == 3)
    resumed, _, teachers = build()
    fit(_trainer(scheme, resumed, terms, tmp_path / "parts", teachers, **SEVERAL), tmp_path / "parts")
    assert _same(_weights(resumed.model), _weights(whole.model))
    others = sorted(path.name for path in (tmp_path / "whole" / "others").iterdir())
    assert others == (["peer_2"] if isinstance(scheme, Mutual) else ["exit_1"])


def test_a_checkpoint_of_other_peers_is_refused(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    steps = iter(range(1, 100))
    trainer = _trainer(Mutual(), _peers(tiny_t5, 2), HARD, tmp_path, **SEVERAL)
    with pytest.raises(Interrupted):
        fit(trainer, tmp_path, stop_when=lambda: next(steps) == 1)
    three = _trainer(Mutual(peers=3), _peers(tiny_t5, 3), HARD, tmp_path, **SEVERAL)
    with pytest.raises(StorageError, match=r"lacks the weights of the peers .*'peer_3'.*start again"):
        fit(three, tmp_path)


def test_terms_of_all_learners_are_logged(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    student, terms = _start(MUTUAL, tiny_t5)
    trainer = _trainer(MUTUAL, student, terms, tmp_path)
    trainer.train()
    (logs,) = [entry for entry in trainer.state.log_history if "loss_label" in entry]
    weights = {"label": 1.0, "rationale": 0.5, "soft": 0.7}
    whole = sum(
        weight * logs[f"loss_{name}{end}"] for end in ("", "_peer_2", "_peer_3") for name, weight in weights.items()
    )
    assert logs["loss"] == pytest.approx(whole, rel=1e-4)
    for name in ("agreement_soft", "teacher_entropy_soft_peer_2", "gradient_share_soft_peer_3", "tokens_label_peer_2"):
        assert name in logs
    assert sum(value for name, value in logs.items() if name.startswith("gradient_share")) == pytest.approx(
        1.0, rel=1e-4
    )
    assert logs["tokens_label"] == sum(len(row.label_ids) for row in ROWS if row.target == TARGETS[0])
