"""From the recipe's training section to TrainingArguments and an optimiser."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.optimization import Adafactor

from distill_llm.core.errors import ConfigError
from distill_llm.core.processes import world_size
from distill_llm.data.rows import Row
from distill_llm.data.sampler import StepSampler
from distill_llm.recipe.train import TrainSpec

_INSTALL = {"tensorboard": "'distill-llm[tensorboard]'", "wandb": "wandb", "trackio": "trackio"}


@dataclass
class DistillArguments(TrainingArguments):
    """Trainer's arguments, and ours."""

    chunk_tokens: int | Literal["auto"] = field(
        default="auto", metadata={"help": "supervised tokens whose logits exist at once; 0: all logits at once"}
    )
    diagnostics: bool = field(default=True, metadata={"help": "log more of each term than its loss"})


def check_reporters(spec: TrainSpec) -> None:
    """Raises ConfigError where a package that the logs should go to is not installed."""
    for name in spec.report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"train.report_to: {name} is not installed. Install it (pip install {_INSTALL[name]}), or remove it."
            )


def rows_per_batch(spec: TrainSpec) -> int:
    """Rows of one micro-batch: as many as the recipe allows that share a process's part of a step evenly.

    Raises ConfigError where the step cannot be shared among the processes.
    """
    ranks = world_size()
    if spec.rows_per_step % ranks:
        raise ConfigError(
            f"train.rows_per_step: {spec.rows_per_step} rows cannot be shared by {ranks} processes. Choose a multiple "
            f"of {ranks}."
        )
    part = spec.rows_per_step // ranks
    return next(rows for rows in range(min(spec.rows_per_batch, part), 0, -1) if part % rows == 0)


def make_sampler(
    rows: Sequence[Row], spec: TrainSpec, *, max_steps: int, seed: int, share_inputs: bool = False
) -> StepSampler:
    """The micro-batches of one training; ``share_inputs``: the student reads an input once for several rows.

    Raises ConfigError where a step cannot be shared among the ranks, or a row is larger than a micro-batch.
    """
    return StepSampler(
        rows,
        rows_per_step=spec.rows_per_step,
        rows_per_batch=rows_per_batch(spec),
        max_steps=max_steps,
        seed=seed,
        ranks=world_size(),
        tokens_per_batch=spec.tokens_per_batch,
        share_inputs=share_inputs,
    )


def make_arguments(
    spec: TrainSpec,
    folder: Path,
    *,
    max_steps: int,
    seed: int,
    validates: bool,
    micro_batches: int = 0,
    bfloat16: bool = False,
) -> DistillArguments:
    """Arguments of one training in ``folder``. Raises ConfigError where the step cannot be shared among the ranks.

    ``micro_batches``: those of one rank in a step, where they are not cut by rows. ``bfloat16``: by autocast.
    """
    values = argument_values(
        spec,
        folder,
        max_steps=max_steps,
        seed=seed,
        validates=validates,
        micro_batches=micro_batches,
        bfloat16=bfloat16,
    )
    return DistillArguments(**values, chunk_tokens=spec.chunk_tokens, diagnostics=spec.diagnostics)


def argument_values(
    spec: TrainSpec,
    folder: Path,
    *,
    max_steps: int,
    seed: int,
    validates: bool,
    micro_batches: int,
    bfloat16: bool,
) -> dict[str, Any]:
    """Those that every Trainer of transformers takes."""
    part = spec.rows_per_step // world_size()
    micro_batches = micro_batches or part // rows_per_batch(spec)
    every = spec.validate_every or max(1, max_steps // 10)
    return {
        "output_dir": str(folder),
        "max_steps": max_steps,
        "per_device_train_batch_size": part // micro_batches,  # for the record: the sampler knows the rows of each
        "gradient_accumulation_steps": micro_batches,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": spec.schedule,
        "warmup_steps": spec.warmup_steps,
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "gradient_checkpointing": spec.gradient_checkpointing,
        "bf16": bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "eval_strategy": "steps" if validates else "no",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": spec.keep_checkpoints + 1,
        "load_best_model_at_end": validates,
        "metric_for_best_model": "eval_accuracy" if validates else None,
        "greater_is_better": True if validates else None,
        "restore_callback_states_from_checkpoint": True,  # or a resume would forget how long patience was tried
        "logging_steps": max(1, min(50, every)),
        "logging_nan_inf_filter": False,  # it would hide a NaN loss
        "report_to": [name for name in spec.report_to if name != "tensorboard"] or "none",  # train.py adds that one
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "seed": seed,
        "data_seed": seed,
        "log_level": "error",
        "log_level_replica": "error",
    }


def make_optimizer(model: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    """AdamW, or Adafactor with per-parameter step sizes (Shazeer & Stern 2018, arXiv:1804.04235), which a small T5
    from a random start needs."""
    weights: list[Any] = [weight for weight in model.parameters() if weight.requires_grad]
    if spec.optimizer == "adafactor":
        return Adafactor(
            weights,
            lr=spec.learning_rate,
            scale_parameter=True,
            relative_step=False,
            warmup_init=False,
            weight_decay=spec.weight_decay,
        )
    return torch.optim.AdamW(weights, lr=spec.learning_rate, weight_decay=spec.weight_decay)
