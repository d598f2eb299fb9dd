"""On-policy distillation by the DistillationTrainer of TRL: from the same recipe into the same run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers.trainer_callback import PrinterCallback

from distill_llm.core.errors import ConfigError
from distill_llm.core.extras import load_extra
from distill_llm.core.files import storage
from distill_llm.core.processes import leave_in_time
from distill_llm.data.rows import Row
from distill_llm.models.load import LoadedModel
from distill_llm.objective import Term
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.on_policy import OnPolicy, Rollouts
from distill_llm.schemes.trl_checks import mixture_of
from distill_llm.training.arguments import argument_values, make_optimizer, rows_per_batch
from distill_llm.training.precision import choose_precision
from distill_llm.training.train import callbacks_for

if TYPE_CHECKING:
    from distill_llm.training.trainer import Validate

_WHERE = "scheme.engine: trl"


@dataclass(frozen=True, slots=True)
class _RowsSeen:
    """TRL draws the rows in an order of its own, so that tokens are counted by their mean."""

    tokens_per_step: float

    def tokens_until(self, step: int) -> int:
        return round(step * self.tokens_per_step)


def make_trl_trainer(
    student: LoadedModel,
    rows: Sequence[Row],
    *,
    spec: TrainSpec,
    max_steps: int,
    scheme: OnPolicy,
    term: Term,
    teacher: Any,
    validate: Validate | None,
    folder: Path,
    seed: int,
) -> Any:
    """TRL's trainer of ``student``, which is changed in place, on the inputs of ``rows``; what they ask for is written.

    Validation, optimiser, schedule, checkpoints and logs are those of our trainer. Raises ConfigError where TRL is not
    installed, or cannot take these models or rows.
    """
    trl = load_extra("trl", "trl", where=_WHERE)
    _check(student, teacher, rows, spec)
    leave_in_time()
    checkpoints = folder / "checkpoints"
    with storage(checkpoints):
        checkpoints.mkdir(parents=True, exist_ok=True)
    values = argument_values(
        spec,
        checkpoints,
        max_steps=max_steps,
        seed=seed,
        validates=validate is not None,
        micro_batches=0,
        bfloat16=choose_precision(spec.precision, student.model).bfloat16,
    )
    args = trl.DistillationConfig(**values, **_written(scheme, term))
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs are used through torchrun
    prompts = {student.tokenizer.decode(list(row.input_ids)): list(row.input_ids) for row in rows}
    order = [student.tokenizer.decode(list(row.input_ids)) for row in rows]
    weight, temperature = cast(float, term.weight), cast(float, getattr(term.loss, "temperature", 1.0))
    data: Any = [] if validate else None  # as in our trainer, whose validation is behind ``validate`` too
    from datasets import Dataset

    trainer = _trainer_class(trl)(
        prompts=prompts,
        factor=weight * temperature**2,
        validate=validate,
        model=student.model,
        teacher_model=teacher,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": order}),
        eval_dataset=data,
        processing_class=student.tokenizer,
        optimizers=(make_optimizer(student.model, spec), None),
        callbacks=callbacks_for(spec, validate, folder),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.step_sampler = _RowsSeen(spec.rows_per_step * sum(row.num_tokens for row in rows) / len(rows))
    return trainer


def _check(student: LoadedModel, teacher: Any, rows: Sequence[Row], spec: TrainSpec) -> None:
    sizes = [model.config.get_text_config().vocab_size for model in (student.model, teacher)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{_WHERE}: the heads of student and teacher have {sizes[0]:,} and {sizes[1]:,} entries, and TRL compares "
            "them entry by entry. Choose two models with heads of one size, or set scheme.engine: trainer."
        )
    if len(rows) < spec.rows_per_step:
        raise ConfigError(
            f"train.rows_per_step: {spec.rows_per_step:,} rows a step, but there are {len(rows):,}, and TRL leaves out "
            "a step that is not full. Lower it, or set scheme.engine: trainer."
        )
    rows_per_batch(spec)


def _written(scheme: OnPolicy, term: Term) -> dict[str, Any]:
    """What TRL's arguments call that which is written, and how it is judged."""
    found = {
        "beta": mixture_of(term.loss),
        "temperature": scheme.temperature,
        "top_p": scheme.top_p,
        "max_completion_length": scheme.max_new_tokens,
    }
    return found | _rollouts(scheme.vllm)


def _rollouts(vllm: Rollouts | None) -> dict[str, Any]:
    if vllm is None:
        return {}
    found = {"use_vllm": True, "vllm_mode": vllm.mode}
    if vllm.mode == "server":
        return found | {"vllm_server_base_url": vllm.server}
    return found | {
        "vllm_gpu_memory_utilization": vllm.gpu_memory_fraction,
        "vllm_tensor_parallel_size": vllm.tensor_parallel_size,
    }


def _trainer_class(trl: Any) -> type[Any]:
    """TRL's trainer with our tokens, our weight, and our validation; made here, because TRL is optional."""

    class HandedOver(trl.DistillationTrainer):  # pyright: ignore[reportGeneralTypeIssues]
        """``prompts``: token ids by text, because the tokenizer alone might end a text that is to be continued."""

        def __init__(
            self, *, prompts: Mapping[str, list[int]], factor: float, validate: Validate | None, **options: Any
        ):
            self._prompts, self._factor, self._validate = prompts, factor, validate
            super().__init__(**options)

        def _tokenize_prompts(self, prompts: Sequence[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
            return [list(self._prompts[prompt]) for prompt in prompts], None, {}

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            """Times the weight and temperature^2, which TRL leaves out."""
            found = super().compute_loss(*args, **kwargs)
            return (found[0] * self._factor, *found[1:]) if isinstance(found, tuple) else found * self._factor

        def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
            if self._validate is None:
                return {}
            scores = self._validate(cast(nn.Module, self.model))
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
            self.model.eval()  # TRL's log tells training from evaluation by it; the next step sets it back
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return HandedOver
