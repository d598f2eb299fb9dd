"""The one trainer: transformers.Trainer with its loss from scheme and objective, and its validation from the task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from distill_llm.core.errors import ConfigError
from distill_llm.core.processes import leave_in_time
from distill_llm.core.signals import Batch
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.data.sampler import StepSampler
from distill_llm.models.checkpoint import load_renamed
from distill_llm.models.cpu_training import quick_on_cpu
from distill_llm.models.head import OutputHead
from distill_llm.models.layers import anchor_of, head_weights, load_heads, save_heads, without_heads
from distill_llm.models.lora import save_bits
from distill_llm.models.peers import Peers, members_of
from distill_llm.models.picture import Painter
from distill_llm.objective import Objective, Watch
from distill_llm.schemes.base import Moment, Scheme
from distill_llm.teachers.base import TensorTeacher
from distill_llm.training.arguments import DistillArguments
from distill_llm.training.diagnostics import Diagnostics
from distill_llm.training.moving import MoveTeachers

Validate = Callable[[nn.Module], dict[str, float]]
"""Scores the model as it stands; the key ``accuracy`` decides which checkpoint is best."""


def save_learner(
    scheme: Scheme, learner: str, model: Any, folder: Path, tokenizer: Any, painter: Painter | None
) -> None:
    """Writes a learner that ``scheme.each`` gave, with all that is needed to use it."""
    scheme.save(learner, model, folder)
    tokenizer.save_pretrained(str(folder))
    if painter is not None:
        painter.save(str(folder))


class DistillTrainer(Trainer):
    """Trains a student on rows. All that Trainer does (DDP, bf16, checkpoints, logging) stays as it is.

    ``step_sampler`` gives every micro-batch of the whole training, so ``args.max_steps`` must be its number of steps.
    """

    loss_is_scaled_for_ga = True  # the objective divides by counts of the whole accumulated batch
    _watch: Watch | None = None

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        rows: Sequence[Row],
        step_sampler: StepSampler,
        collator: Collator,
        scheme: Scheme,
        objective: Objective,
        teachers: Mapping[str, TensorTeacher] | None = None,
        validate: Validate | None = None,
        **options: Any,
    ):
        # Several GPUs are used through torchrun; in one process Trainer would fall back to DataParallel.
        args._n_gpu = min(args.n_gpu, 1)
        leave_in_time()  # the arguments have made the group of processes
        # Trainer insists on an evaluation set; ours is behind ``validate``.
        data: Any = [] if validate else None
        super().__init__(model=model, args=args, data_collator=collator, eval_dataset=data, **options)
        self.remove_callback(PrinterCallback)
        self.rows, self.step_sampler, self.collator = rows, step_sampler, collator
        self.scheme, self.objective, self.teachers = self._unsharded(scheme), objective, dict(teachers or {})
        self._moving = MoveTeachers(self.teachers)
        self.add_callback(self._moving)
        self._now, self.validate = scheme.for_learners(objective.at(0.0)), validate
        chunk_tokens = args.chunk_tokens if isinstance(args, DistillArguments) else "auto"
        self._head = OutputHead(members_of(model)[0], chunk_tokens=chunk_tokens) if chunk_tokens else None
        self._means, self._steps_of = dict[str, Tensor](), Counter[str]()  # by term: a step may leave one out
        self._diagnostics = Diagnostics() if getattr(args, "diagnostics", True) else None

    @cached_property
    def _has_heads(self) -> bool:
        return bool(head_weights(self.model))

    def _unsharded(self, scheme: Scheme) -> Scheme:
        """The scheme, if it can be had as the training is spread over processes."""
        several = len(scheme.learners) > 1 or isinstance(self.model, Peers)
        if (several or scheme.converts) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            leaves = "several models" if several else "another model than the one that learned"
            raise ConfigError(
                f"scheme: {type(scheme).model_fields['kind'].default} leaves {leaves}, which cannot be made while FSDP "
                "or DeepSpeed share out the weights. Use plain torchrun (DDP)."
            )
        return scheme

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = DataLoader(
            self.rows,  # pyright: ignore[reportArgumentType]  # a sequence is all that DataLoader asks for
            batch_sampler=self.step_sampler,
            collate_fn=self.collator,
            pin_memory=torch.cuda.is_available(),
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The micro-batches of one step, and each term's tokens in all of them on all ranks."""
        batches = [self._prepare_inputs(batch) for batch in islice(epoch_iterator, num_batches)]
        step = self.state.global_step
        progress = step / max(1, self.args.max_steps)
        now = self.scheme.at_step(self.objective.at(progress), step, self.args.seed)
        self._now = self.scheme.for_learners(now)
        batches = self.scheme.prepare(batches, self.model, self._moment(progress))
        self._steps_of.update(term.name for term in self._now.terms)
        counts = self._counts(batches)
        if self._diagnostics is not None:
            if self.scheme.writes:
                self._diagnostics.look_at_own(batches)
            self._watch = self._diagnostics.begin(self._now.terms, counts, closely=self._logs_this_step())
        return batches, counts

    def _moment(self, progress: float) -> Moment:
        tokenizer = self.processing_class
        return Moment(self.state.global_step, progress, self.args.seed, self._now, self.collator, tokenizer)

    def _logs_this_step(self) -> bool:
        step = self.state.global_step + 1
        return step % max(1, self.state.logging_steps) == 0 or (step == 1 and self.args.logging_first_step)

    def _counts(self, batches: Sequence[Batch]) -> Tensor:
        counts = torch.stack([self._now.counts(batch) for batch in batches]).sum(0)
        return self._over_ranks(counts.to(self.args.device))

    def _over_ranks(self, numbers: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(numbers, reduction="sum"))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.args.device.type != "cpu":
            return super().training_step(*args, **kwargs)
        with quick_on_cpu(cast(nn.Module, self.model)):  # the backward pass included, which may go forward once more
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        counts = num_items_in_batch if isinstance(num_items_in_batch, Tensor) else self._counts([inputs])
        losses = []
        pairs = self.scheme.compare(model, self.teachers, inputs, self._now, self._head)
        for learner, (student, teachers) in zip(self.scheme.learners, pairs, strict=True):
            loss, means = self._now(student, teachers, counts, self._watch, learner)
            losses.append(loss)
            for name, mean in means.items():
                self._means[name] = self._means.get(name, torch.zeros_like(mean)) + mean
        total = torch.stack(losses).sum()
        if self._has_heads:
            total = total + anchor_of(model)
        total = total * self.accelerator.num_processes  # undoes DDP's mean over ranks
        return (total, {"loss": total}) if return_outputs else total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each term's mean since the last training log, and the diagnostics."""
        if "loss" in logs and self._means:
            summed = self._over_ranks(torch.stack(list(self._means.values())))
            for name, value in zip(self._means, summed.tolist(), strict=True):
                logs[f"loss_{name}"] = value / max(self._steps_of[name], 1)
            self._means = {}
            self._steps_of.clear()
            if self._diagnostics is not None:
                logs |= self._diagnostics.values(self._over_ranks)
                self._watch = None
        super().log(logs, start_time)

    def save_learners(self, folder: Path) -> tuple[str, dict[str, float | None]]:
        """Saves the learner that becomes the student to ``folder/model``, others to ``folder/others/<name>``.

        Gives the first one's name, and the validation accuracy of each of the others.
        """
        names = self.scheme.learners
        if len(names) == 1 and not isinstance(self.model, Peers) and not self.scheme.converts:
            self.save_model(str(folder / "model"))
            return names[0], {}
        step = self.state.best_global_step or self.state.global_step
        logged = [entry for entry in self.state.log_history if entry["step"] == step and "eval_accuracy" in entry]
        scores = {name: logged[-1][f"eval_accuracy_{name}"] for name in names} if logged and len(names) > 1 else {}
        chosen = self.scheme.student_among(scores)
        for name, model in self.scheme.each(self.model) if self.args.should_save else ():
            own = folder / "model" if name == chosen else folder / "others" / name
            save_learner(self.scheme, name, model, own, self.processing_class, self.collator.painter)
        return chosen, {name: scores.get(name) for name in names if name != chosen}

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The norm of all gradients; each of several peers is clipped by its own, or one would hold back the others."""
        if not isinstance(self.model, Peers):
            return super()._clip_grad_norm(model)
        limit = self.args.max_grad_norm
        norms = [self.accelerator.clip_grad_norm_(peer.parameters(), limit) for peer in self.model.peers]
        return torch.stack([cast(Tensor, norm) for norm in norms]).norm()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self.model, Peers):
            self.model.load_learned(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            load_renamed(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if isinstance(self.model, Peers):
            self.model.load_learned(Path(str(self.state.best_model_checkpoint)))
        else:
            super()._load_best_model()
            load_renamed(self.model, Path(str(self.state.best_model_checkpoint)))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The student alone: hint heads lie beside it in a checkpoint, and are left out of the finished model."""
        if isinstance(self.model, Peers):
            if self.args.should_save:
                Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
                self.model.save_learned(Path(str(output_dir)))
            return
        if head_weights(self.model):
            state_dict = without_heads(cast(nn.Module, self.model).state_dict() if state_dict is None else state_dict)
        super()._save(output_dir, state_dict)
        save_bits(self.model, Path(output_dir or str(self.args.output_dir)))
        if self.collator.painter is not None:
            self.collator.painter.save(output_dir or str(self.args.output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._moving.save(Path(output_dir))
            save_heads(self.model, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._moving.load(Path(checkpoint))
            load_heads(self.model, Path(checkpoint))

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The task's score on the validation examples."""
        if self.validate is None:
            return {}
        metrics = {
            f"{metric_key_prefix}_{name}": value for name, value in self.validate(cast(nn.Module, self.model)).items()
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
