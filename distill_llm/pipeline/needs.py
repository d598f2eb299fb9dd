"""What a recipe with several stages needs of disk and memory, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.core.progress import Progress
from distill_llm.evaluation.text_tables import short_bytes, short_count
from distill_llm.models.load import read_config, read_tokenizer, weightless_student
from distill_llm.pipeline.arms import Arm
from distill_llm.pipeline.place import free_disk
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.frozen import Frozen

if TYPE_CHECKING:
    from distill_llm.recipe.train import Optimizer
    from distill_llm.schemes.stages import Stage
    from distill_llm.teachers.base import TensorTeacherSpec

_NUMBER = 4  # bytes of a float32: weights that are trained, their gradients and states, whatever a pass computes in
_SHORT = {"bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.5}


@dataclass(frozen=True, slots=True)
class Needs:
    """One stage's, in bytes; ``checkpoints`` are there while it is trained, ``activations`` are not counted.

    ``training``: weights, gradients and the optimiser's states; ``beside``: the weights of its ``teachers``.
    """

    name: str
    description: str
    parameters: int
    disk: int
    training: int
    beside: int
    teachers: tuple[str, ...]
    checkpoints: int
    is_trained: bool = True

    def __str__(self) -> str:
        size = f"{self.description}: {short_count(self.parameters)} parameters, {short_bytes(self.disk)} on disk"
        if not self.is_trained:
            return f"{size}; not trained: {short_bytes(self.training)} of weights in memory while it is made"
        beside = f" and {short_bytes(self.beside)} of teachers ({', '.join(self.teachers)})" if self.teachers else ""
        return (
            f"{size}; while it is trained, {short_bytes(self.training)} of weights, gradients and optimiser "
            f"states{beside} in memory, and up to {short_bytes(self.checkpoints)} of checkpoints"
        )


def needs_of_stages(recipe: Recipe, tokenizer: Any) -> list[Needs]:
    """Of each stage, from configs alone. Raises ConfigError where one cannot be had."""
    run = RunFolder(recipe.folder)
    models: dict[str, Any] = {}
    found: list[Needs] = []
    for stage in recipe.stages:
        begun = {str(run.model(name)): name for name in models}
        same = models.get(begun.get(stage.student.model, ""))
        where = f"scheme: stage '{stage.name}'"
        if same is None or stage.student.cut is not None:
            config = None if same is None else same.config
            models[stage.name] = weightless_student(stage.student, tokenizer, where=where, begun=config)
        else:
            models[stage.name] = same
        sizes = {one.name: one.parameters for one in found}
        found.append(_needs(recipe, stage, models[stage.name], sizes))
    return found


def say_needs(recipe: Recipe, arms: Sequence[Arm], run: RunFolder, progress: Progress) -> None:
    """A line for each stage that is not trained yet, and one for all; nothing where there is a single stage."""
    stages = {stage.name for stage in recipe.stages}
    waiting = {arm.name for arm in arms if arm.name in stages and not run.result(arm.name).exists()}
    if len(stages) < 2 or not waiting:
        return
    needs = [
        one
        for one in needs_of_stages(recipe, read_tokenizer(str(run.tokenizer), where="student.tokenizer"))
        if one.name in waiting
    ]
    for one in needs:
        progress.say(f"stage {one.name}: {one}")
    progress.say(summary_of(needs, run.root)[0])


def summary_of(needs: Sequence[Needs], folder: Path) -> tuple[str, bool]:
    """All stages in one line, and whether the disk under ``folder`` has room for them."""
    disk = sum(one.disk for one in needs) + max(one.checkpoints for one in needs)
    memory = max(one.training + one.beside for one in needs)
    free = free_disk(folder)
    room = "of" if disk <= free else "MORE THAN the"
    said = (
        f"{len(needs)} stages, one after the other: at most {short_bytes(disk)} {room} {short_bytes(free)} that are "
        f"free in {folder}, and {short_bytes(memory)} of memory, activations aside"
    )
    return said, disk <= free


def _needs(recipe: Recipe, stage: Stage, model: Any, sizes: dict[str, int]) -> Needs:
    weights = list(model.parameters())
    trained = [tuple(weight.shape) for weight in weights if weight.requires_grad]
    parameters = sum(weight.numel() for weight in weights)
    learned = sum(map(prod, trained))
    states = _state_numbers(trained, recipe.train.optimizer)
    teachers: dict[str, int] = {}
    for term in stage.terms:
        if term.teacher is not None and term.teacher in stage.teachers:
            _add_teacher(teachers, term.teacher, stage, sizes, parameters)
    saved = stage.scheme.saved_bytes(model)
    disk = _NUMBER * (parameters if stage.student.lora is None else learned) if saved is None else saved
    if not stage.share_of_steps:
        return Needs(stage.name, stage.description, parameters, disk, _NUMBER * parameters, 0, (), 0, is_trained=False)
    kept = recipe.train.keep_checkpoints + 2  # the best one besides, and the one that is being written
    rates = len(recipe.train.tune) if stage.validated and recipe.train.tune else 1
    return Needs(
        name=stage.name,
        description=stage.description,
        parameters=parameters,
        disk=disk,
        training=_NUMBER * (parameters + learned + states),
        beside=sum(teachers.values()),
        teachers=tuple(name for name, size in teachers.items() if size),
        checkpoints=_NUMBER * (learned if stage.student.lora else parameters) * kept * rates
        + _NUMBER * states * kept * rates,
    )


def _state_numbers(trained: Sequence[tuple[int, ...]], optimizer: Optimizer) -> int:
    """What the optimiser keeps: two means a weight, or, in Adafactor, a mean a row and a column of each matrix."""
    if optimizer == "adamw":
        return 2 * sum(map(prod, trained))
    return sum(
        prod(shape[:-1]) + prod((*shape[:-2], shape[-1])) if len(shape) > 1 else prod(shape) for shape in trained
    )


def _add_teacher(found: dict[str, int], name: str, stage: Stage, sizes: dict[str, int], student: int) -> None:
    """A teacher's weights and those of its members, each once."""
    if name in found:
        return
    spec = stage.teachers[name]
    numbers = sizes[name] if name in sizes else spec.num_parameters(student)
    found[name] = round(numbers * (_NUMBER if name in sizes else _bytes_of_a_weight(spec)))
    for member in spec.members():
        _add_teacher(found, member, stage, sizes, student)


def _bytes_of_a_weight(spec: TensorTeacherSpec) -> float:
    if not isinstance(spec, Frozen):
        return _NUMBER
    if spec.load_in != "full" or spec.dtype != "auto":
        return _SHORT.get(spec.load_in if spec.load_in != "full" else spec.dtype, _NUMBER)
    stored = read_config(spec.model, spec.revision, where=f"teachers: frozen '{spec.model}'").dtype
    return _SHORT.get(str(stored).removeprefix("torch."), _NUMBER)
