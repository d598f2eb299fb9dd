"""One training: a model, its rows, its objective; resumed where it was left; the best checkpoint kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from distill_llm.core.errors import Interrupted, StorageError
from distill_llm.core.files import storage
from distill_llm.core.layout import part_tokens_for
from distill_llm.core.processes import is_main_process
from distill_llm.core.progress import SILENT, Progress
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.models.load import LoadedModel
from distill_llm.models.packing import check_packing, gains_by_packing
from distill_llm.models.peers import members_of
from distill_llm.objective import Objective
from distill_llm.recipe.train import Packing, TrainSpec
from distill_llm.schemes.base import Scheme
from distill_llm.schemes.stages import STUDENT
from distill_llm.teachers.base import StoredTeacher, TensorTeacher
from distill_llm.teachers.viewed import ViewedTeacher
from distill_llm.training.arguments import make_arguments, make_optimizer, make_sampler
from distill_llm.training.callbacks import Clock, ProgressBar, StopCleanly
from distill_llm.training.precision import choose_precision
from distill_llm.training.trainer import DistillTrainer, Validate


@dataclass(frozen=True, slots=True)
class Trained:
    """What one training came to. ``validation_accuracy`` is the best checkpoint's, at ``best_step``; None where nothing
    was validated, and the last step is kept. ``learner`` became the student; ``others`` learned beside it, and what is
    said of each is its validation accuracy at the same step."""

    steps: int
    best_step: int
    tokens: int
    seconds: float
    validation_accuracy: float | None
    learner: str
    others: Mapping[str, float | None]


def make_trainer(
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
) -> DistillTrainer:
    """A trainer of ``student``, which is changed in place; its checkpoints lie in ``folder/checkpoints``."""
    checkpoints = folder / "checkpoints"
    collator = collator_for(student, teachers, spec.packing, keyed=scheme.writes)
    sampler = make_sampler(rows, spec, max_steps=max_steps, seed=seed, share_inputs=collator.part_tokens > 0)
    arguments = make_arguments(
        spec,
        checkpoints,
        max_steps=max_steps,
        seed=seed,
        validates=validate is not None,
        micro_batches=sampler.micro_batches,
        bfloat16=choose_precision(spec.precision, student.model).bfloat16,
    )
    with storage(checkpoints):
        checkpoints.mkdir(parents=True, exist_ok=True)
    return DistillTrainer(
        model=student.model,
        args=arguments,
        rows=rows,
        step_sampler=sampler,
        collator=collator,
        scheme=scheme,
        objective=objective,
        teachers=teachers,
        validate=validate,
        processing_class=student.tokenizer,
        optimizers=(make_optimizer(student.model, spec), None),
        callbacks=callbacks_for(spec, validate, folder),
    )


def fit(
    trainer: DistillTrainer,
    folder: Path,
    *,
    progress: Progress = SILENT,
    name: str = "student",
    stop_when: Callable[[], bool] = lambda: False,
) -> Trained:
    """Trains from the last whole checkpoint on, and saves the best model to ``folder/model``; those of others that
    learned beside it to ``folder/others``.

    Raises Interrupted after a signal, or when ``stop_when`` says so, with a checkpoint on disk.
    """
    clock, stop = Clock(folder / "clock.json"), StopCleanly(stop_when)
    for callback in [clock, stop, *([ProgressBar(progress, name)] if is_main_process() else [])]:
        trainer.add_callback(callback)
    checkpoints = Path(str(trainer.args.output_dir))
    with stop, storage(checkpoints):
        trainer.train(resume_from_checkpoint=_last_whole_checkpoint(checkpoints))
    state, max_steps = trainer.state, trainer.args.max_steps
    if stop.asked and state.global_step < max_steps:
        raise Interrupted(f"stopped at step {state.global_step} of {max_steps}; a checkpoint is saved.")
    seconds = clock.seconds
    with storage(folder):
        learner, others = _save(trainer, folder)
    return Trained(
        steps=state.global_step,
        best_step=state.best_global_step or state.global_step,
        tokens=trainer.step_sampler.tokens_until(state.global_step),
        seconds=round(seconds, 3),
        validation_accuracy=state.best_metric,
        learner=learner,
        others=others,
    )


def _save(trainer: Trainer, folder: Path) -> tuple[str, Mapping[str, float | None]]:
    """The name of the learner that becomes the student, and the validation accuracy of each of the others."""
    if isinstance(trainer, DistillTrainer):
        return trainer.save_learners(folder)
    trainer.save_model(str(folder / "model"))
    return STUDENT, {}


def collator_for(
    student: LoadedModel,
    teachers: Mapping[str, TensorTeacher] | None = None,
    packing: Packing = "auto",
    *,
    keyed: bool = False,
) -> Collator:
    """``teachers``: all that are open, members of others included; None: batches are to suit any. ``keyed``: with the
    keys of rows, also where no teacher finds what it says by them.

    Raises ConfigError where the recipe wants packing that the student does not know.
    """
    pad = student.tokenizer.pad_token_id
    views = {
        name: Collator(
            teacher.reader.tokenizer.pad_token_id,
            teacher.reader.decoder_start_token_id,
            painter=teacher.reader.painter,
        )
        for name, teacher in (teachers or {}).items()
        if isinstance(teacher, ViewedTeacher)
    }
    keyed = keyed or teachers is None or any(isinstance(teacher, StoredTeacher) for teacher in teachers.values())
    if student.painter is not None:
        begin = student.model.config.decoder_start_token_id
        return Collator(pad, begin, keyed=keyed, views=views, painter=student.painter)
    if student.is_encoder_decoder:
        part_tokens = 0 if packing == "never" else part_tokens_for(student.model.device.type)
        begin = student.model.config.decoder_start_token_id
        return Collator(pad, begin, part_tokens=part_tokens, keyed=keyed, views=views)
    models = members_of(student.model)
    packs = packing == "always" or (packing == "auto" and all(map(gains_by_packing, models)))
    if packs:
        for model in models:
            check_packing(model)
    return Collator(pad, None, packs=packs, keyed=keyed, views=views)


def callbacks_for(spec: TrainSpec, validate: Validate | None, folder: Path) -> list[TrainerCallback]:
    """What the recipe asks of a training in ``folder`` besides its steps."""
    return [*_early_stopping(spec, validate), *_tensorboard(spec, folder)]


def _early_stopping(spec: TrainSpec, validate: Validate | None) -> list[TrainerCallback]:
    return [EarlyStoppingCallback(early_stopping_patience=spec.patience)] if spec.patience and validate else []


def _tensorboard(spec: TrainSpec, folder: Path) -> list[TrainerCallback]:
    """Logs beside the training's folder, which is gone when the best model is chosen."""
    if "tensorboard" not in spec.report_to or not is_main_process():
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(folder.parent / "tensorboard" / folder.name)))]


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; a torn one, left by a kill, is removed."""
    while (last := get_last_checkpoint(str(folder))) is not None:
        if (Path(last) / "trainer_state.json").is_file():
            return last
        if not is_main_process():
            raise StorageError(f"{last}: this checkpoint is torn. Delete it and start again.")
        shutil.rmtree(last)
    return None
