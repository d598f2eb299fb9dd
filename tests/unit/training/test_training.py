"""Training on a CPU: a resume that changes nothing, the best checkpoint, early and clean stops, and what is logged."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import set_seed

from distill_llm.core.errors import ConfigError, Interrupted
from distill_llm.core.schedule import Schedule
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.objective import Objective, Term
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.frozen import FrozenTeacher
from distill_llm.training.arguments import make_arguments
from distill_llm.training.callbacks import StopCleanly
from distill_llm.training.train import Trained, fit, make_trainer
from distill_llm.training.trainer import DistillTrainer

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
        Term(name="rationale", loss=CrossEntropy(), targets=("rationale",), weight=0.5),
    ]
)


@dataclass
class Scores:
    """Gives the validation accuracies that the test wants, one by one, and notes the weights that it saw."""

    values: list[float]
    seen: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def __call__(self, model: Any) -> dict[str, float]:
        self.seen.append(_weights(model))
        return {"accuracy": self.values[len(self.seen) - 1]}


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def _train(model: LoadedModel, folder: Path, *, max_steps: int = 6, **options: Any) -> Trained:
    spec = {"max_steps": max_steps, "rows_per_step": 4, "rows_per_batch": 2, "learning_rate": 1e-2, "validate_every": 2}
    spec |= options.pop("spec", {})
    set_seed(17)
    trainer = make_trainer(
        model,
        ROWS,
        spec=TrainSpec.model_validate(spec),
        max_steps=max_steps,
        scheme=StepByStep(),
        objective=options.pop("objective", OBJECTIVE),
        teachers=options.pop("teachers", {}),
        validate=options.pop("validate", None),
        folder=folder,
        seed=17,
    )
    return fit(trainer, folder, **options)


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def _checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("checkpoint-*"))


@pytest.fixture
def with_dropout(request: pytest.FixtureRequest) -> Callable[[str], LoadedModel]:
    """Builds a student whose forward pass draws random numbers."""

    def build(family: str) -> LoadedModel:
        dropout = {"t5": {"dropout_rate": 0.2}, "llama": {"attention_dropout": 0.2}}[family]
        return request.getfixturevalue(f"tiny_{family}")(seed=5, **dropout)

    return build


@pytest.mark.parametrize(
    ("family", "optimizer", "stop_at"), [("t5", "adamw", 3), ("t5", "adafactor", 4), ("llama", "adamw", 3)]
)
def test_interrupted_and_resumed_is_uninterrupted_to_the_bit(
    with_dropout: Callable[[str], LoadedModel], tmp_path: Path, family: str, optimizer: str, stop_at: int
) -> None:
    """Weights, optimiser, schedule, rows and dropout all go on where they were, between checkpoints too."""
    options: dict[str, Any] = {"spec": {"optimizer": optimizer, "warmup_steps": 2}}
    whole = with_dropout(family)
    _train(whole, tmp_path / "whole", **options)

    steps = iter(range(1, 100))
    stopped = with_dropout(family)
    with pytest.raises(Interrupted, match=f"stopped at step {stop_at} of 6; a checkpoint is saved"):
        _train(stopped, tmp_path / "parts", stop_when=lambda: next(steps) == stop_at, **options)
    assert f"checkpoint-{stop_at}" in _checkpoints(tmp_path / "parts")

    resumed = with_dropout(family)
    trained = _train(resumed, tmp_path / "parts", **options)
    assert trained.steps == 6
    assert _same(_weights(resumed.model), _weights(whole.model))
    assert not _same(_weights(whole.model), _weights(with_dropout(family).model)), "the model did learn something"


def test_dropout_is_on_while_training(with_dropout: Callable[[str], LoadedModel], tiny_t5: Any, tmp_path: Path) -> None:
    """Or the test above would show less than it says."""
    first, second = with_dropout("t5"), tiny_t5(seed=5, dropout_rate=0.0)
    assert _same(_weights(first.model), _weights(second.model))
    _train(first, tmp_path / "a", max_steps=1)
    _train(second, tmp_path / "b", max_steps=1)
    assert not _same(_weights(first.model), _weights(second.model))


def test_a_training_on_a_cpu_leaves_dropout_and_its_attention_not_to_torch(
    with_dropout: Callable[[str], LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is itself again when it is validated."""
    student = with_dropout("t5")
    kinds = [type(part) for part in student.model.modules()]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch was asked")

    def validate(model: Any) -> dict[str, float]:
        assert [type(part) for part in model.modules()] == kinds
        return {"accuracy": 0.5}

    monkeypatch.setattr(torch.nn.functional, "dropout", refuse)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    _train(student, tmp_path, max_steps=2, validate=validate)
    assert [type(part) for part in student.model.modules()] == kinds


def test_a_torn_checkpoint_is_passed_over(with_dropout: Callable[[str], LoadedModel], tmp_path: Path) -> None:
    whole, resumed = with_dropout("t5"), with_dropout("t5")
    _train(whole, tmp_path / "whole")
    steps = iter(range(1, 100))
    with pytest.raises(Interrupted):
        _train(resumed, tmp_path / "parts", stop_when=lambda: next(steps) == 3)
    torn = tmp_path / "parts" / "checkpoints" / "checkpoint-5"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    again = with_dropout("t5")
    _train(again, tmp_path / "parts")
    assert _same(_weights(again.model), _weights(whole.model))


@pytest.mark.parametrize(("values", "best"), [([0.1, 0.9, 0.5], 4), ([0.9, 0.1, 0.9], 2), ([0.1, 0.2, 0.3], 6)])
def test_the_best_checkpoint_is_kept_and_saved(
    tiny_t5: Callable[..., LoadedModel], tmp_path: Path, values: list[float], best: int
) -> None:
    """Validation decides, the earliest wins a tie, and the saved model has the weights that were validated."""
    from safetensors.torch import load_file

    model, scores = tiny_t5(seed=5), Scores(values)
    trained = _train(model, tmp_path, validate=scores)
    assert (trained.best_step, trained.validation_accuracy, trained.steps) == (best, max(values), 6)
    expected = scores.seen[best // 2 - 1]
    assert len(scores.seen) == 3
    assert not _same(scores.seen[0], scores.seen[1])
    assert _same(_weights(model.model), expected)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(weight, expected[name]) for name, weight in saved.items())
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_training_stops_when_validation_gains_nothing(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    model, scores = tiny_t5(seed=5), Scores([0.5, 0.4, 0.5, 0.9])
    trained = _train(model, tmp_path, max_steps=20, validate=scores, spec={"patience": 2})
    assert (trained.steps, trained.best_step, trained.validation_accuracy) == (6, 2, 0.5)
    assert _same(_weights(model.model), scores.seen[0])


def test_patience_survives_a_resume(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """One validation without a gain before the interrupt and one after it are two."""
    steps = iter(range(1, 100))
    options: dict[str, Any] = {"max_steps": 20, "spec": {"patience": 2}}
    with pytest.raises(Interrupted):
        _train(
            tiny_t5(seed=5),
            tmp_path,
            validate=Scores([0.5, 0.4]),
            stop_when=lambda: next(steps) == 5,
            **options,
        )
    trained = _train(tiny_t5(seed=5), tmp_path, validate=Scores([0.4, 0.9, 0.9]), **options)
    assert (trained.steps, trained.best_step) == (6, 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tiny_t5: Callable[..., LoadedModel], tmp_path: Path, number: int) -> None:
    steps = iter(range(1, 100))

    def kill() -> bool:
        if next(steps) == 3:
            os.kill(os.getpid(), number)
        return False

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="of 6"):
        _train(tiny_t5(seed=5), tmp_path, stop_when=kill)
    assert {"checkpoint-3", "checkpoint-4"} & set(_checkpoints(tmp_path))
    assert signal.getsignal(number) is before
    assert not (tmp_path / "model").exists()
    assert json.loads((tmp_path / "clock.json").read_text())["seconds"] > 0


def test_the_second_signal_does_not_wait() -> None:
    stop = StopCleanly()
    stop._ask(2, None)
    assert stop.asked
    with pytest.raises(KeyboardInterrupt):
        stop._ask(2, None)


def test_tokens_are_those_of_the_rows_that_were_seen(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Three steps of four rows are one epoch of the twelve: every token once."""
    trained = _train(tiny_t5(), tmp_path, max_steps=3)
    assert trained.tokens == sum(len(row.input_ids) + len(row.label_ids) for row in ROWS)
    assert trained.validation_accuracy is None, "nothing was validated"


def _logs(folder: Path) -> dict[int, dict[str, float]]:
    (last,) = (folder / "checkpoints").glob("checkpoint-6")
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry for entry in history if "loss" in entry}


def test_the_logged_parts_add_up_to_the_logged_loss(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """loss = label + 0.5 rationale, as means over the steps since the last log; after a resume too."""
    _train(tiny_t5(seed=5), tmp_path / "whole")
    whole = _logs(tmp_path / "whole")
    assert list(whole) == [2, 4, 6]
    for entry in whole.values():
        assert entry["loss"] == pytest.approx(entry["loss_label"] + 0.5 * entry["loss_rationale"], rel=1e-4)
    steps = iter(range(1, 100))
    with pytest.raises(Interrupted):
        _train(tiny_t5(seed=5), tmp_path / "parts", stop_when=lambda: next(steps) == 4)
    _train(tiny_t5(seed=5), tmp_path / "parts")
    resumed = _logs(tmp_path / "parts")[6]
    assert resumed["loss_label"] == pytest.approx(whole[6]["loss_label"])
    assert resumed["loss_rationale"] == pytest.approx(whole[6]["loss_rationale"])


class Noting(Objective):
    """Changes while it is trained on, and notes the progress at which it is asked for."""

    def __init__(self, until: float = 0.7) -> None:
        fading = Term(
            name="soft",
            loss=ForwardKL(temperature=Schedule(start=4.0, end=1.0)),
            targets=("label",),
            teacher="big",
            weight=Schedule(start=1.0, end=0.25, over=0.5),
            until=until,
        )
        super().__init__([*OBJECTIVE.terms, fading])
        self.seen: list[float] = []

    def at(self, progress: float) -> Objective:
        self.seen.append(progress)
        return super().at(progress)


def test_schedules_go_on_where_they_were(
    with_dropout: Callable[[str], LoadedModel], tmp_path: Path, tiny_t5: Any
) -> None:
    """Six steps, stopped after the fourth: the same weights to the bit, and the progress of each step is its own."""
    objective, big = Noting(), {"big": FrozenTeacher(tiny_t5(seed=8).model)}
    whole, stopped, resumed = (with_dropout("t5") for _ in range(3))
    _train(whole, tmp_path / "whole", objective=objective, teachers=big)
    assert objective.seen == [0.0, *(step / 6 for step in range(6))]  # at first for the trainer that is built

    steps = iter(range(1, 100))
    with pytest.raises(Interrupted):
        _train(
            stopped,
            tmp_path / "parts",
            objective=Noting(),
            teachers=big,
            stop_when=lambda: next(steps) == 4,
        )
    rest = Noting()
    _train(resumed, tmp_path / "parts", objective=rest, teachers=big)
    assert rest.seen == [0.0, 4 / 6, 5 / 6]
    assert _same(_weights(resumed.model), _weights(whole.model))


@pytest.mark.parametrize(("until", "steps", "logged"), [(0.3, 2, [2]), (0.5, 3, [2, 4]), (0.7, 5, [2, 4, 6])])
def test_a_teacher_is_run_until_its_terms_end(
    tiny_t5: Callable[..., LoadedModel], tmp_path: Path, until: float, steps: int, logged: list[int]
) -> None:
    """Two rows of labels a step, in the first share of the six steps; what has ended is logged no more."""
    big, read = tiny_t5(seed=8).model, []
    big.get_encoder().register_forward_hook(lambda *ran: read.append(len(ran[-1][0])))
    _train(tiny_t5(seed=5), tmp_path, objective=Noting(until), teachers={"big": FrozenTeacher(big)})
    assert sum(read) == 2 * steps
    assert [step for step, entry in _logs(tmp_path).items() if "loss_soft" in entry] == logged


def test_a_step_that_the_processes_cannot_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    spec = TrainSpec(max_steps=1, rows_per_step=8, rows_per_batch=4)
    with pytest.raises(ConfigError, match=r"train\.rows_per_step: 8 rows cannot be shared by 3 processes"):
        make_arguments(spec, tmp_path, max_steps=1, seed=0, validates=False)


def test_arguments_are_those_that_do_no_harm(tmp_path: Path) -> None:
    """Each stands for a trap: a hidden NaN, dropped columns, DataParallel, a string for a number."""
    spec = TrainSpec(max_steps=50, rows_per_step=8, rows_per_batch=4, keep_checkpoints=2)
    arguments = make_arguments(spec, tmp_path, max_steps=50, seed=3, validates=True)
    assert arguments.logging_nan_inf_filter is False
    assert arguments.remove_unused_columns is False
    assert arguments.gradient_accumulation_steps == 2
    assert (arguments.eval_steps, arguments.save_steps, arguments.save_total_limit) == (5, 5, 3)
    assert (arguments.seed, arguments.data_seed) == (3, 3)
    assert DistillTrainer.loss_is_scaled_for_ga is True


def test_a_nan_is_seen(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    model = tiny_t5(seed=5)
    with torch.no_grad():
        model.model.get_input_embeddings().weight[5] = float("nan")
    _train(model, tmp_path)
    assert _logs(tmp_path)[6]["loss"] != _logs(tmp_path)[6]["loss"]
