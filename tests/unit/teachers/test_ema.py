"""The student's own average as its teacher: how it moves, what it shares, and that a resume changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import set_seed

from distill_llm.core.errors import Interrupted, StorageError
from distill_llm.core.signals import model_inputs, signals_of
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.models.lora import add_lora
from distill_llm.models.spec import LoraSpec
from distill_llm.objective import Objective, Term
from distill_llm.pipeline.doctor import examine
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.base import MovingTeacher
from distill_llm.teachers.ema import Ema, EmaTeacher
from distill_llm.teachers.ensemble import EnsembleTeacher
from distill_llm.teachers.frozen import FrozenTeacher
from distill_llm.teachers.student import StudentFacts
from distill_llm.training.moving import MoveTeachers
from distill_llm.training.train import fit, make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distill_llm.models.load import LoadedModel

ROWS = [
    row
    for example in range(6)
    for row in (
        Row(example, "label", [5, 6, 7 + example], [8 + example % 3, 1]),
        Row(example, "rationale", [9, 6, 7 + example], [*range(10, 14 + example), 1]),
    )
]
OBJECTIVE = Objective(
    [
        Term(name="label", loss=CrossEntropy(), targets=("label",)),
        Term(name="soft", loss=ForwardKL(), targets=("label", "rationale"), teacher="own", weight=2.0),
    ]
)


def _copies(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def _shake(model: Any, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=noise))


def test_it_begins_as_the_student_without_dropout_and_stays_where_it_is(tiny_model: Callable[..., LoadedModel]) -> None:
    dropout = "attention_dropout" if tiny_model().model.config.model_type == "llama" else "dropout_rate"
    student = tiny_model(seed=1, vocab_size=80, **{dropout: 0.5})
    facts = StudentFacts(student.tokenizer.get_vocab(), student.is_encoder_decoder, "cpu", student.model)
    batch = Collator(0, 0 if student.is_encoder_decoder else None)(ROWS)
    expected = signals_of(student.model.eval()(**model_inputs(batch)).logits, batch).narrowed(facts.width)
    student.model.train()
    teacher = Ema().open(facts)
    said = teacher.signals(batch)
    torch.testing.assert_close(said.logits, expected.logits)
    assert not said.logits.requires_grad
    assert student.model.training
    assert all(weight.requires_grad for weight in student.model.parameters())
    _shake(student.model, 1)
    torch.testing.assert_close(teacher.signals(batch).logits, expected.logits)
    assert Ema().num_parameters(123) == 123


@pytest.mark.parametrize("decay", [0.6, 0.75, 0.999])
def test_it_moves_as_in_the_paper(tiny_model: Callable[..., LoadedModel], decay: float) -> None:
    """In float64, weight by weight; with a decay near 1 it is the plain mean of all weights so far."""
    student = tiny_model(seed=1).model
    teacher = EmaTeacher(student, decay=decay)
    seen = [_copies(student)]
    means = {name: weight.double() for name, weight in seen[0].items()}
    for step in range(1, 7):
        _shake(student, step)
        teacher.after_step(student, step)
        seen.append(_copies(student))
        kept = min(1 - 1 / (step + 1), decay)
        means = {name: kept * means[name] + (1 - kept) * seen[-1][name].double() for name in means}
    state = teacher.state()
    assert state.keys() == means.keys()
    for name, mean in means.items():
        torch.testing.assert_close(state[name].double(), mean, atol=1e-5, rtol=1e-5)
        if decay == 0.999:
            plain = torch.stack([weights[name].double() for weights in seen]).mean(0)
            torch.testing.assert_close(state[name].double(), plain, atol=1e-5, rtol=1e-5)


def test_without_a_memory_it_is_the_student_as_it_is(tiny_model: Callable[..., LoadedModel]) -> None:
    """``decay: 0``: after each step the same weights to the bit, without dropout and without a gradient."""
    student = tiny_model(seed=1)
    teacher = Ema(decay=0).open(
        StudentFacts(student.tokenizer.get_vocab(), student.is_encoder_decoder, "cpu", student.model)
    )
    assert isinstance(teacher, MovingTeacher)
    batch = Collator(0, 0 if student.is_encoder_decoder else None)(ROWS)
    for step in range(1, 4):
        _shake(student.model, step)
        teacher.after_step(student.model, step)
        weights = dict(student.model.named_parameters())
        assert all(torch.equal(weight, weights[name]) for name, weight in teacher.state().items())
        own = signals_of(student.model.eval()(**model_inputs(batch)).logits, batch)
        said = teacher.signals(batch).logits
        torch.testing.assert_close(said, own.logits[:, : said.size(-1)], atol=1e-5, rtol=1e-5)
        assert not said.requires_grad


def test_it_copies_and_moves_only_what_learns(tiny_model: Callable[..., LoadedModel]) -> None:
    """LoRA: the base is one for both, the adapters are its own."""
    student = tiny_model(seed=1)
    model = add_lora(student.model, LoraSpec(rank=2))
    teacher = EmaTeacher(model, decay=0.5)
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learning
    assert set(teacher.state()) == learning
    own = dict(teacher._model.named_parameters())
    for name, weight in model.named_parameters():
        assert (own[name].data_ptr() == weight.data_ptr()) == (name not in learning), name
        assert not own[name].requires_grad
    before = _copies(teacher._model)
    _shake(model, 1)
    teacher.after_step(model, 1)
    for name, weight in teacher._model.named_parameters():
        wanted = (before[name] + dict(model.named_parameters())[name]) / 2 if name in learning else before[name]
        torch.testing.assert_close(weight, wanted)


def _train(student: LoadedModel, folder: Path, teachers: dict[str, Any], **options: Any) -> None:
    spec = {"max_steps": 6, "rows_per_step": 4, "rows_per_batch": 2, "learning_rate": 1e-2, "validate_every": 2}
    set_seed(17)
    trainer = make_trainer(
        student,
        ROWS,
        spec=TrainSpec.model_validate(spec),
        max_steps=6,
        scheme=StepByStep(),
        objective=OBJECTIVE,
        teachers=teachers,
        validate=None,
        folder=folder,
        seed=17,
    )
    fit(trainer, folder, **options)


def _stopped(student: LoadedModel, folder: Path, teachers: dict[str, Any]) -> None:
    steps = iter(range(1, 100))
    with pytest.raises(Interrupted):
        _train(student, folder, teachers, stop_when=lambda: next(steps) == 3)


@pytest.fixture(params=["alone", "in an ensemble", "lora"])
def pupil(request: pytest.FixtureRequest, tiny_t5: Any) -> Callable[[], tuple[LoadedModel, EmaTeacher, dict[str, Any]]]:
    """A student with dropout, its average, and the teachers of a training with it."""

    def build() -> tuple[LoadedModel, EmaTeacher, dict[str, Any]]:
        from distill_llm.models.load import LoadedModel

        student = tiny_t5(seed=5, dropout_rate=0.2)
        if request.param == "lora":
            student = LoadedModel(add_lora(student.model, LoraSpec(rank=2)), student.tokenizer)
        words = len(student.tokenizer)
        own = EmaTeacher(student.model, words, decay=0.7)
        if request.param != "in an ensemble":
            return student, own, {"own": own}
        members = [own, FrozenTeacher(tiny_t5(seed=8).model, words)]
        both = EnsembleTeacher(members, (1.0, 1.0), mean="probabilities", by="fixed", width=words)
        return student, own, {"mean": own, "own": both}

    return build


def test_interrupted_and_resumed_is_uninterrupted_to_the_bit(pupil: Callable[[], Any], tmp_path: Path) -> None:
    whole, whole_own, teachers = pupil()
    start = _copies(whole.model)
    _train(whole, tmp_path / "whole", teachers)
    assert not _same(_copies(whole.model), start)

    stopped, _, teachers = pupil()
    _stopped(stopped, tmp_path / "parts", teachers)
    resumed, own, teachers = pupil()
    _train(resumed, tmp_path / "parts", teachers)
    assert _same(own.state(), whole_own.state())
    assert _same(_copies(resumed.model), _copies(whole.model))


def test_a_resume_without_its_state_would_be_noticed(
    pupil: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the test above would show less than it says."""
    whole, _, teachers = pupil()
    _train(whole, tmp_path / "whole", teachers)
    stopped, _, teachers = pupil()
    _stopped(stopped, tmp_path / "parts", teachers)
    monkeypatch.setattr(MoveTeachers, "load", lambda self, folder: None)
    resumed, _, teachers = pupil()
    _train(resumed, tmp_path / "parts", teachers)
    assert not _same(_copies(resumed.model), _copies(whole.model))


def test_it_moves_once_a_step_towards_the_weights_after_it(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Not once a micro-batch, of which a step has two."""

    class Noting(EmaTeacher):
        seen: list[tuple[int, dict[str, torch.Tensor]]]

        def after_step(self, model: Any, step: int) -> None:
            super().after_step(model, step)
            self.seen.append((step, _copies(model)))

    student = tiny_t5(seed=5)
    own = Noting(student.model, len(student.tokenizer), decay=0.999)
    own.seen, start = [], _copies(student.model)
    _train(student, tmp_path, {"own": own})
    assert [step for step, _ in own.seen] == [1, 2, 3, 4, 5, 6]
    assert not _same(own.seen[0][1], start)
    assert _same(own.seen[-1][1], _copies(student.model))
    for name, mean in own.state().items():
        every = [start[name], *(weights[name] for _, weights in own.seen)]
        torch.testing.assert_close(mean, torch.stack(every).mean(0))


def test_a_checkpoint_of_a_training_with_other_teachers_is_refused(
    tiny_t5: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    student = tiny_t5(seed=5)
    _stopped(student, tmp_path, {"own": FrozenTeacher(tiny_t5(seed=8).model)})
    assert not list(tmp_path.rglob("teachers.pt")), "what does not move has no state"
    student = tiny_t5(seed=5)
    with pytest.raises(StorageError, match=r"checkpoint-3.* lacks the state of the teachers \['own'\].*start again"):
        _train(student, tmp_path, {"own": EmaTeacher(student.model, decay=0.9)})


YAML = """
name: tiny
task: {kind: shop, products: 20, train_size: 32, validation_size: 8, test_size: 8}
student:
  config: {model_type: llama, hidden_size: 8, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}
  tokenizer: {kind: words, vocab_size: 256}
teachers:
  own: {kind: ema}
  slow: {kind: ema, decay: 0.9999}
  both: {kind: ensemble, of: [own, slow]}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: soft, loss: {kind: forward_kl}, targets: [label], teacher: own}
train: {max_steps: 2, rows_per_step: 8, rows_per_batch: 8}
"""


@pytest.mark.parametrize("teacher", ["own", "both"])
def test_a_student_that_agrees_with_itself_at_step_0_is_no_error(teacher: str) -> None:
    """Without dropout the two say the same until the first step: no loss and no gradient, and yet all is well."""
    diagnosis = examine(recipe_from(parse_yaml(YAML.replace("teacher: own", f"teacher: {teacher}"), "test"), ()))
    soft = next(facts for facts in diagnosis.terms if facts.name == "soft")
    assert soft.tokens > 0
    assert soft.loss == pytest.approx(0.0, abs=1e-6)
    assert diagnosis.may_run, diagnosis.findings
