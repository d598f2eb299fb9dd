"""What a training, and writing, take at most of memory: found by running the very code without numbers.

Nothing here knows an architecture, an optimiser or a loss: what PyTorch would hold at a time is counted while a step
of the trainer is made (``models/dry_run.py``). Imports torch at the top: import it inside functions.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import Trainer, TrainerCallback
from transformers.modeling_outputs import BaseModelOutput

from distill_llm.data.rows import Row
from distill_llm.models.dry_run import DryRun, Kind, dry, saved_for_backward
from distill_llm.models.gpu_attention import attention_as_on_a_gpu
from distill_llm.models.head import AUTO_BYTES
from distill_llm.models.load import load_on
from distill_llm.pipeline.heap_model import gaps
from distill_llm.pipeline.plan_rows import largest, padded_tokens, widths
from distill_llm.pipeline.plan_teachers import CachedShapes
from distill_llm.pipeline.trial import Trial, make_trial_trainer
from distill_llm.teachers.base import TensorTeacher
from distill_llm.teachers.beside import ModelBeside
from distill_llm.teachers.frozen import Frozen
from distill_llm.teachers.viewed import ViewedTeacher
from distill_llm.training.arguments import make_sampler
from distill_llm.training.precision import choose_precision

GAPS = "gaps between tensors"
_STEPS = 200  # whose micro-batches are looked at for the largest one
_CPU_ENCODER_TOKENS = 2048  # as models/generate.py cuts an encoder's batches


@dataclass(frozen=True, slots=True)
class Work:
    """Floating point operations, bytes read and written, and calls of operations."""

    flops: float = 0.0
    moved: float = 0.0
    calls: float = 0.0

    def times(self, size: float, calls: float | None = None) -> Work:
        return Work(size * self.flops, size * self.moved, (size if calls is None else calls) * self.calls)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of tensors at the moment when there were most, by what they are for."""

    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class TrainingCosts:
    """``batch`` is the work of a micro-batch of mean size, ``update`` that of the optimiser; ``largest_batch`` are rows
    and tokens of its longest input and target."""

    parameters: int
    learned: int
    memory: Memory
    lasting: Memory
    largest_batch: tuple[int, int, int]
    batches_a_step: int
    batch: Work
    update: Work
    computes_in: str


class _Fixed:
    """Micro-batches that were chosen."""

    micro_batches = 1

    def __init__(self, batches: Sequence[Sequence[int]]):
        self._batches = batches

    def __iter__(self) -> Iterator[Sequence[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


class _Accumulating(TrainerCallback):
    """Each step begins with the gradients of earlier micro-batches."""

    def __init__(self, run: DryRun, weights: Sequence[nn.Parameter]):
        self._run, self._weights = run, weights

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        _give_gradients(self._run, self._weights)


def training_costs(trial: Trial, cached: Mapping[str, CachedShapes], device: str) -> TrainingCosts:
    """Of the trial's largest micro-batch and one update, after the optimiser has its states. Loads no weights."""
    recipe, rows = trial.recipe, trial.rows
    sampler = make_sampler(
        rows,
        recipe.train,
        max_steps=min(_STEPS, trial.arm.max_steps),
        seed=recipe.training_seed,
        share_inputs=recipe.train.packing != "never",
    )
    batches = list(sampler)
    worst = largest(batches, rows)
    mean_tokens = sum(padded_tokens([rows[index] for index in batch]) for batch in batches) / len(batches)
    share = mean_tokens / padded_tokens([rows[index] for index in worst])
    on_gpu = device != "cpu"
    with dry() as run, attention_as_on_a_gpu(on_gpu):
        teachers: dict[str, TensorTeacher] = {name: shapes.teacher(run) for name, shapes in cached.items()}
        trainer = make_trial_trainer(replace(trial, arm=replace(trial.arm, max_steps=1), validation=()), teachers)
        trainer.step_sampler = cast(Any, _Fixed([worst]))
        trainer.args.gradient_accumulation_steps, trainer.args.save_strategy = 1, cast(Any, "no")
        model: Any = trainer.model
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        _mark(run, model, trainer.teachers)
        update = _first_update(run, trainer, weights)
        lasting = Memory(_named(run.live))
        if sampler.micro_batches > 1:
            trainer.add_callback(_Accumulating(run, weights))
        if on_gpu:
            trainer.training_step = lambda *given, **options: Trainer.training_step(trainer, *given, **options)
        run.restart()
        with saved_for_backward(run):
            trainer.train()
        peak = dict(run.peak + Counter({"working": _unpacked(model)}))
        events = run.events
        parameters = sum(weight.numel() for weight in model.parameters())
        whole = Work(run.flops, run.moved, run.calls)
        computes = choose_precision(recipe.train.precision, model)
    batch = Work(whole.flops - update.flops, max(0.0, whole.moved - update.moved), max(0.0, whole.calls - update.calls))
    return TrainingCosts(
        parameters,
        sum(weight.numel() for weight in weights),
        Memory(_named(peak) | ({GAPS: gaps(events)} if not on_gpu else {})),
        lasting,
        (len(worst), *widths([rows[index] for index in worst])),
        sampler.micro_batches,
        batch.times(share, calls=1.0),
        update,
        computes.name,
    )


def _mark(run: DryRun, model: nn.Module, teachers: Mapping[str, TensorTeacher]) -> None:
    run.mark_model(model, "weights")
    for teacher in teachers.values():
        inner = teacher.teacher if isinstance(teacher, ViewedTeacher) else teacher
        if isinstance(inner, ModelBeside):
            run.mark_model(inner.model, "teachers")


def _first_update(run: DryRun, trainer: Any, weights: Sequence[nn.Parameter]) -> Work:
    """Lets the optimiser make its states; gives what an update is of work."""
    _give_gradients(run, weights)
    for weight in weights:
        weight.register_post_accumulate_grad_hook(lambda one: run.mark(cast(Tensor, one.grad), "gradients"))
    trainer.optimizer.step()
    for state in trainer.optimizer.state.values():
        for tensor in state.values():
            if isinstance(tensor, FakeTensor):
                run.mark(tensor, "states")
    run.restart()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return Work(run.flops, run.moved, run.calls)


def _give_gradients(run: DryRun, weights: Sequence[nn.Parameter]) -> None:
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        run.mark(weight.grad, "gradients")


def _unpacked(model: nn.Module) -> int:
    """Of the largest quantized weight, as it is while it is computed with."""
    packed = (weight for weight in model.parameters() if hasattr(weight, "stored_bytes"))
    return max((weight.numel() * weight.element_size() for weight in packed), default=0)


def _named(parts: Mapping[Kind, int] | Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}


@dataclass(frozen=True, slots=True)
class WritingCosts:
    """``parts`` of memory when all rows have written all; ``read`` and ``step``: work of a prompt batch and of a
    step of all its rows."""

    parameters: int
    words: int
    memory: Memory
    read: Work
    step: Work


def writing_costs(make: Any, *, rows: int, tokens_in: int, tokens_out: int, device: str) -> WritingCosts:
    """Of a batch of prompts that are continued, by the model that ``make`` gives."""
    with dry() as run, torch.no_grad():
        model = make().eval()
        run.mark_model(model, "weights")
        weights = run.live["weights"]
        run.restart()
        out = _read(model, rows, tokens_in, device)
        read, peak = Work(run.flops, run.moved, run.calls), run.peak.total()
        kept, cross, layer = _cache_bytes(out.past_key_values)
        begun = 1 if model.config.is_encoder_decoder else tokens_in
        run.restart()
        _write_one(model, rows, tokens_in, out, begun)
        step = Work(run.flops, run.moved, run.calls)
        words = model.get_output_embeddings().weight.size(0)
        parameters = sum(weight.numel() for weight in model.parameters())
        unpacked = _unpacked(model)
    grown = kept * (begun + tokens_out) // begun
    largest_layer = layer * (begun + tokens_out) // begun  # there twice while a token is added
    cache = grown + cross
    working = max(3 * 4 * rows * words + largest_layer, peak - weights - kept - cross) + unpacked
    parts = {"weights": weights, "cache": cache, "working": working}
    return WritingCosts(parameters, words, Memory(parts), read, step)


def _read(model: Any, rows: int, tokens: int, device: str) -> Any:
    ids = torch.ones(rows, tokens, dtype=torch.long)
    if not model.config.is_encoder_decoder:
        return model(input_ids=ids, attention_mask=ids, use_cache=True, **_last_logits(model))
    size = max(1, _CPU_ENCODER_TOKENS // tokens) if device == "cpu" else rows
    states = []
    for start in range(0, rows, size):
        part = ids[start : start + size]
        states.append(model.get_encoder()(input_ids=part, attention_mask=part).last_hidden_state)
    found = BaseModelOutput(last_hidden_state=torch.cat(states))
    return model(encoder_outputs=found, attention_mask=ids, decoder_input_ids=ids[:, :1], use_cache=True)


def _write_one(model: Any, rows: int, tokens_in: int, out: Any, begun: int) -> None:
    one = torch.ones(rows, 1, dtype=torch.long)
    if model.config.is_encoder_decoder:
        states = BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)
        mask = torch.ones(rows, tokens_in, dtype=torch.long)
        given = {"encoder_outputs": states, "attention_mask": mask, "decoder_input_ids": one}
    else:
        given = {"input_ids": one, "attention_mask": torch.ones(rows, begun + 1, dtype=torch.long)}
    model(**given, past_key_values=out.past_key_values, use_cache=True, **_last_logits(model))


def _last_logits(model: Any) -> dict[str, int]:
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


def _cache_bytes(cache: Any) -> tuple[int, int, int]:
    """Of a cache: what grows with each token, what does not, and the largest layer's share of the former."""
    own, cross = getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None)
    layers = [_layer_bytes(layer) for layer in own.layers]
    return sum(layers), sum(map(_layer_bytes, cross.layers)) if cross is not None else 0, max(layers)


def _layer_bytes(layer: Any) -> int:
    return sum(part.numel() * part.element_size() for part in (layer.keys, layer.values) if isinstance(part, Tensor))


def reading_memory(spec: Frozen, rows: Sequence[Row], device: str) -> dict[str, int]:
    """Of a teacher that reads a batch of rows, and of all its logits there: as when its signals are written."""
    tokens_in, tokens_out = (max(width) for width in zip(*(widths([row]) for row in rows), strict=True))

    def make() -> Any:
        where = "teachers: frozen"
        return load_on("cpu", spec.model, spec.revision, where=where, dtype=spec.dtype, load_in=spec.load_in)

    costs = writing_costs(make, rows=len(rows), tokens_in=tokens_in + tokens_out, tokens_out=0, device=device)
    found = {"teachers": costs.memory.parts["weights"], "working": costs.memory.parts["working"]}
    chunk = min(AUTO_BYTES, 4 * len(rows) * tokens_out * costs.words)
    return found | {"logits": 2 * chunk}
