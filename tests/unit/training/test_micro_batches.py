"""Micro-batches by padded tokens, through a training: its accumulation, its resume, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError
from transformers import set_seed

from distill_llm.core.errors import ConfigError, Interrupted
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.objective import Objective, Term
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.training.train import fit, make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distill_llm.models.load import LoadedModel
    from distill_llm.training.trainer import DistillTrainer

ROWS = [
    row
    for example in range(6)
    for row in (
        Row(example, "label", [5, 6, 7 + example], [8 + example % 3, 1]),
        Row(example, "rationale", [9, 6, 7 + example], [*range(10, 12 + 3 * example), 1]),
    )
]
OBJECTIVE = Objective(
    [
        Term(name="label", loss=CrossEntropy(), targets=("label",)),
        Term(name="rationale", loss=CrossEntropy(), targets=("rationale",)),
    ]
)


def _trainer(student: LoadedModel, folder: Path, **spec: Any) -> DistillTrainer:
    set_seed(17)
    keys = {"max_steps": 6, "rows_per_step": 4, "learning_rate": 1e-2, "validate_every": 2, "tokens_per_batch": 30}
    return make_trainer(
        student,
        ROWS,
        spec=TrainSpec.model_validate(keys | spec),
        max_steps=6,
        scheme=StepByStep(),
        objective=OBJECTIVE,
        teachers={},
        validate=None,
        folder=folder,
        seed=17,
    )


def test_a_resume_goes_on_with_the_rows_that_are_next(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Trainer skips as many micro-batches as were seen: with dropout, the same weights to the bit."""
    whole, stopped, resumed = (tiny_t5(seed=5, dropout_rate=0.2) for _ in range(3))
    trainer = _trainer(whole, tmp_path / "whole")
    assert trainer.args.gradient_accumulation_steps == 2, "neither 1 nor 4: cut by tokens"
    fit(trainer, tmp_path / "whole")
    steps = iter(range(1, 100))
    with pytest.raises(Interrupted, match="stopped at step 3"):
        fit(_trainer(stopped, tmp_path / "parts"), tmp_path / "parts", stop_when=lambda: next(steps) == 3)
    trained = fit(_trainer(resumed, tmp_path / "parts"), tmp_path / "parts")
    assert trained.tokens == 2 * sum(row.num_tokens for row in ROWS), "six steps of four rows are two epochs"
    expected = whole.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.model.state_dict().items())


def test_a_row_that_does_not_fit_is_refused(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.tokens_per_batch: a row has 21 tokens, which is more than 20"):
        _trainer(tiny_t5(), tmp_path, tokens_per_batch=20)


def test_rows_per_batch_is_not_looked_at_beside_tokens() -> None:
    TrainSpec(max_steps=1, rows_per_step=96, rows_per_batch=64, tokens_per_batch=4096)
    with pytest.raises(ValidationError, match="multiple of rows_per_batch"):
        TrainSpec(max_steps=1, rows_per_step=96, rows_per_batch=64)
