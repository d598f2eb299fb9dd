"""One training: a model, its rows, its objective; resumed where it was left; the best checkpoint kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from distill_llm.core.errors import Interrupted, StorageError
from distill_llm.core.files import storage
from distill_llm.core.progress import Progress
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.data.sampler import StepSampler
from distill_llm.models.load import LoadedModel
from distill_llm.objective import Objective
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.base import Scheme
from distill_llm.teachers.base import TensorTeacher
from distill_llm.training.arguments import is_main_process, make_arguments, make_optimizer
from distill_llm.training.callbacks import Clock, ProgressBar, StopCleanly
from distill_llm.training.trainer import DistillTrainer, Validate


@dataclass(frozen=True, slots=True)
class Trained:
    """What one training came to. ``validation_accuracy`` is the best checkpoint's, at ``best_step``."""

    steps: int
    best_step: int
    tokens: int
    seconds: float
    validation_accuracy: float


def train(
    student: LoadedModel,
    rows: Sequence[Row],
    *,
    spec: TrainSpec,
    max_steps: int,
    scheme: Scheme,
    objective: Objective,
    teachers: Mapping[str, TensorTeacher],
    validate: Validate | None,
    folder: Path,
    seed: int,
    progress: Progress,
    name: str,
    stop_when: Callable[[], bool] = lambda: False,
) -> Trained:
    """Trains ``student`` in place, and saves the best model to ``folder/model``. Resumes from ``folder``.

    Raises Interrupted after a signal, with a checkpoint on disk.
    """
    sampler = StepSampler(
        rows, rows_per_step=spec.rows_per_step, rows_per_batch=spec.rows_per_batch, max_steps=max_steps, seed=seed
    )
    checkpoints = folder / "checkpoints"
    with storage(checkpoints):
        checkpoints.mkdir(parents=True, exist_ok=True)
    arguments = make_arguments(spec, checkpoints, max_steps=max_steps, seed=seed, validates=validate is not None)
    clock = Clock(folder / "clock.json")
    stop = StopCleanly(stop_when)
    trainer = DistillTrainer(
        model=student.model,
        args=arguments,
        rows=rows,
        step_sampler=sampler,
        collator=collator_for(student),
        scheme=scheme,
        objective=objective,
        teachers=teachers,
        validate=validate,
        processing_class=student.tokenizer,
        optimizers=(make_optimizer(student.model, spec), None),
        callbacks=[clock, *_early_stopping(spec, validate), stop, *_bar(progress, name)],
    )
    with stop, storage(checkpoints):
        trainer.train(resume_from_checkpoint=_last_whole_checkpoint(checkpoints))
    if stop.asked and trainer.state.global_step < max_steps:
        raise Interrupted(f"stopped at step {trainer.state.global_step} of {max_steps}; a checkpoint is saved.")
    seconds = clock.seconds
    with storage(folder):
        trainer.save_model(str(folder / "model"))
    steps = trainer.state.global_step
    batches = islice(sampler, steps * (spec.rows_per_step // spec.rows_per_batch))
    return Trained(
        steps=steps,
        best_step=trainer.state.best_global_step or steps,
        tokens=sum(rows[index].num_tokens for batch in batches for index in batch),
        seconds=round(seconds, 3),
        validation_accuracy=trainer.state.best_metric if trainer.state.best_metric is not None else float("nan"),
    )


def collator_for(student: LoadedModel) -> Collator:
    start = student.model.config.decoder_start_token_id if student.is_encoder_decoder else None
    return Collator(student.tokenizer.pad_token_id, start)


def _early_stopping(spec: TrainSpec, validate: Validate | None) -> list[TrainerCallback]:
    return [EarlyStoppingCallback(early_stopping_patience=spec.patience)] if spec.patience and validate else []


def _bar(progress: Progress, name: str) -> list[TrainerCallback]:
    return [ProgressBar(progress, name)] if is_main_process() else []


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; a torn one, left by a kill, is removed."""
    while (last := get_last_checkpoint(str(folder))) is not None:
        if (Path(last) / "trainer_state.json").is_file():
            return last
        if not is_main_process():
            raise StorageError(f"{last}: this checkpoint is torn. Delete it and start again.")
        shutil.rmtree(last)
    return None


def describe(trained: Trained) -> dict[str, Any]:
    return {field: getattr(trained, field) for field in Trained.__dataclass_fields__}
