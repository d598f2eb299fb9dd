"""What a recipe will take of memory, disk, tokens and time, before any weight is downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from distill_llm.core.example import Splits
from distill_llm.models.load import build_student, load_on
from distill_llm.pipeline.arms import Arm, plan_arms
from distill_llm.pipeline.plan_disk import disk_of
from distill_llm.pipeline.plan_rows import PlanRows, plan_rows, widths
from distill_llm.pipeline.plan_teachers import cached_shapes
from distill_llm.pipeline.rationale_stage import check
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.student_stage import sizes_of
from distill_llm.pipeline.trial import Trial, max_new_tokens
from distill_llm.recipe.recipe import Recipe
from distill_llm.schemes.on_policy import OnPolicy
from distill_llm.teachers.frozen import Frozen
from distill_llm.teachers.transformers import Transformers

if TYPE_CHECKING:
    from distill_llm.models.load import LoadedModel
    from distill_llm.pipeline.memory_model import TrainingCosts, WritingCosts
    from distill_llm.pipeline.preview import Preview
    from distill_llm.pipeline.time_model import Machine
    from distill_llm.rationales.voices import Voice

GPU_CONTEXT = 500 * 2**20
"""Of a process on a GPU before its first tensor: what CUDA's context takes, roughly."""
BASELINE = "interpreter and libraries"


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that a recipe does, and bytes of memory by what they are for, of each of its ``processes``."""

    name: str
    parts: Mapping[str, int]
    processes: int = 1

    @property
    def total(self) -> int:
        return self.processes * sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One training of ``steps`` optimiser steps; ``validation`` is None where nothing is validated."""

    arm: Arm
    costs: TrainingCosts
    validation: WritingCosts | None
    validated_rows: int


@dataclass(frozen=True, slots=True)
class Memories:
    """All moments of a recipe, and what they were found from."""

    stages: tuple[StagePlan, ...]
    writing: Mapping[str, WritingCosts]
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)


@dataclass(frozen=True, slots=True)
class Plan:
    """``limit`` is None where nobody knows. ``seconds`` are of each thing done, in order; ``disk`` by what lies there.

    ``preview`` is None where no teacher of text is asked.
    """

    recipe: Recipe
    device: str
    machine: Machine
    limit: int
    limit_from: str
    rows: PlanRows
    memories: Memories
    disk: Mapping[str, int]
    free_disk: int
    preview: Preview | None
    seconds: Mapping[str, float]
    notes: Sequence[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.memories.peak.total <= self.limit and sum(self.disk.values()) <= self.free_disk


@dataclass(frozen=True, slots=True)
class Ground:
    """What plans of a recipe and of its variations have in common."""

    splits: Splits
    rows: PlanRows
    baseline: int
    folder: Path
    device: str


def prepare(recipe: Recipe, folder: Path, device: str, *, baseline: int | None = None) -> Ground:
    """Reads examples, configs and tokenizers. Raises DistillError where the recipe could not run.

    ``baseline``: bytes of a process before any model; None: measured, of this one.
    """
    from distill_llm.pipeline.place import baseline_bytes

    splits = check(recipe)
    rows = plan_rows(recipe, splits, folder / "tokenizer")
    if device == "cpu":
        baseline = baseline_bytes() if baseline is None else baseline
    else:
        baseline = GPU_CONTEXT if baseline is None else baseline
    return Ground(splits, rows, baseline, folder, device)


def memories_of(recipe: Recipe, ground: Ground) -> Memories:
    """Every moment's memory. Loads no weights."""
    recipe = _reading_alone(recipe)
    with TemporaryDirectory(dir=ground.folder) as place:
        stages = tuple(_plan_stages(recipe, ground, Path(place)))
    writing = {voice.name or "teacher": _writing(voice, ground) for voice in _local_voices(recipe)}
    moments = list(_moments(recipe, ground, stages, writing))
    return Memories(stages, writing, tuple(moments))


def _reading_alone(recipe: Recipe) -> Recipe:
    """Texts that the student would write are as long as they may be in the plan's rows."""
    if isinstance(recipe.scheme, OnPolicy):
        still = recipe.scheme.model_copy(update={"student_fraction": 0.0, "engine": "trainer", "vllm": None})
        return recipe.model_copy(update={"scheme": still})
    return recipe


def arms_of(recipe: Recipe, rows: PlanRows) -> list[Arm]:
    """With the steps that all training examples would make."""
    from distill_llm.models.dry_run import dry

    if recipe.train.epochs:
        own = [row for row in rows.rows if any(row.target in term.targets for term in recipe.objective)]
        steps = max(1, ceil(recipe.train.epochs * len(own) * rows.times / recipe.train.rows_per_step))
        train = recipe.train.model_copy(update={"epochs": 0.0, "max_steps": steps})
        recipe = recipe.model_copy(update={"train": train})
    with dry():
        student = build_student(recipe.student, rows.tokenizer)
        sizes = sizes_of(recipe, student, RunFolder(recipe.folder))
    return plan_arms(recipe, rows.rows, sizes)


def _plan_stages(recipe: Recipe, ground: Ground, place: Path) -> Iterator[StagePlan]:
    from distill_llm.pipeline.memory_model import training_costs, writing_costs

    run, there = RunFolder(recipe.folder), dict[str, str]()
    arms = {arm.name: arm for arm in arms_of(recipe, ground.rows)}
    labelled = [example for example in ground.splits.validation if example.label is not None]
    for stage in recipe.stages:
        arm = arms[stage.name]
        moved = {name: _moved(spec, there) for name, spec in arm.teachers.items()}
        arm = replace(arm, student=_moved(arm.student, there), teachers=moved)
        own = arm.recipe(recipe)
        student = _weightless(own, ground)
        there[str(run.model(arm.name))] = _leave_config(student, place / "finished" / arm.name)
        if not arm.max_steps:
            continue  # it is saved as it starts, which takes less than any training
        trial = Trial(
            arm,
            recipe.train.learning_rate,
            own,
            arm.rows_of(ground.rows.rows),
            (),
            ground.rows.folder,
            place / arm.name,
        )
        costs = training_costs(trial, cached_shapes(own, ground.rows.rows, ground.rows.tokenizer), ground.device)
        validation = None
        if arm.validated and labelled and student.painter is None:
            longest = max(widths([row])[0] for row in trial.rows)
            validation = writing_costs(
                lambda own=own: build_student(own.student, ground.rows.tokenizer).model,
                rows=min(recipe.evaluate.batch_rows, len(labelled)),
                tokens_in=longest,
                tokens_out=max_new_tokens(recipe) if recipe.evaluate.by == "generation" else 1,
                device=ground.device,
            )
        yield StagePlan(arm, costs, validation, len(labelled))


def _moved(spec: Any, there: Mapping[str, str]) -> Any:
    """With the stand-in of an earlier stage's model in place of the model."""
    found = there.get(getattr(spec, "model", ""))
    return spec if found is None else spec.model_copy(update={"model": found})


def _weightless(recipe: Recipe, ground: Ground) -> LoadedModel:
    from distill_llm.models.dry_run import dry

    with dry():
        return build_student(recipe.student, ground.rows.tokenizer)


def _leave_config(student: LoadedModel, folder: Path) -> str:
    """Where a model without weights lies, for the stages that begin with it or learn from it."""
    inner: Any = student.model
    inner = inner.get_base_model() if hasattr(inner, "peft_config") else inner
    inner.config.save_pretrained(str(folder))
    student.tokenizer.save_pretrained(str(folder))
    return str(folder)


def _local_voices(recipe: Recipe) -> list[Voice]:
    voices = recipe.rationales.voices if recipe.rationales is not None else ()
    return [voice for voice in voices if isinstance(voice.teacher, Transformers)]


def _writing(voice: Voice, ground: Ground) -> WritingCosts:
    """Of a batch of the longest prompts of some examples."""
    from distill_llm.pipeline.memory_model import writing_costs
    from distill_llm.rationales.prompts import make_prompter

    spec = voice.teacher
    assert isinstance(spec, Transformers)
    prompter = make_prompter(voice.prompt, where=voice.prompt_where)
    longest = sorted(ground.splits.train, key=lambda example: -len(example.prompt))[:32]
    tokens = max(spec.count_tokens([prompter.render(example) for example in longest]))
    where = "rationales.teacher.model"
    return writing_costs(
        lambda: load_on("cpu", spec.model, spec.revision, where=where, dtype=spec.dtype, load_in=spec.load_in),
        rows=spec.batch_rows,
        tokens_in=tokens,
        tokens_out=voice.sampling.max_new_tokens,
        device=ground.device,
    )


def _moments(
    recipe: Recipe, ground: Ground, stages: Sequence[StagePlan], writing: Mapping[str, WritingCosts]
) -> Iterator[Moment]:
    base = {BASELINE: ground.baseline}
    for name, costs in writing.items():
        yield Moment(f"{name} writes rationales", {**base, **costs.memory.parts})
    yield from _caching(recipe, ground, stages)
    for stage in stages:
        trials = len(recipe.train.tune) if recipe.train.tune and stage.arm.validated else 1
        waiting = trials if len(stages) > 1 else trials * (1 + len(recipe.evaluate.controls))
        processes = min(recipe.train.workers, max(1, waiting))
        yield Moment(f"{stage.arm.name} is trained", {**base, **stage.costs.memory.parts}, processes)
        if stage.validation is not None:
            lasting = {name: size for name, size in stage.costs.lasting.parts.items() if name != "working"}
            beside = {name: size for name, size in stage.validation.memory.parts.items() if name != "weights"}
            yield Moment(f"{stage.arm.name} answers validation", {**base, **lasting, **beside}, processes)


def _caching(recipe: Recipe, ground: Ground, stages: Sequence[StagePlan]) -> Iterator[Moment]:
    """A teacher says what is written down, beside the student that gives its words."""
    from distill_llm.pipeline.memory_model import reading_memory

    student = stages[-1].costs.lasting.parts.get("weights", 0)
    for name, spec in recipe.teachers.items():
        if not spec.asked_once or not spec.made_of():
            continue
        frozen = recipe.teachers[spec.made_of()[0]]
        if isinstance(frozen, Frozen):
            rows = [row for row in ground.rows.rows if len(row.label_ids)]
            parts = reading_memory(frozen, rows[: recipe.train.rows_per_batch], ground.device)
            base = {BASELINE: ground.baseline, "weights": student}
            yield Moment(f"signals of {name} are written", base | parts)


def plan_recipe(recipe: Recipe, *, memory: int | None = None, device: str = "") -> Plan:
    """Everything of a recipe at once. ``memory``: bytes that may be taken; None: those that the device has free.

    ``device``: cpu, cuda, or a GPU of the table; empty: where it would run here.
    """
    with TemporaryDirectory() as folder:
        recipe = recipe.resolved()
        ground, machine = begin(recipe, Path(folder), device)
        return finish(recipe, ground, machine, memory)


def begin(recipe: Recipe, folder: Path, device: str) -> tuple[Ground, Machine]:
    """The ground of all plans of the recipe, and the machine that they are for. The baseline is measured first, before
    anything else has taken memory."""
    from distill_llm.pipeline.place import machine_of, simulated_device

    ground = prepare(recipe, folder, simulated_device(device))
    return ground, machine_of(device)


def finish(recipe: Recipe, ground: Ground, machine: Machine, memory: int | None) -> Plan:
    from distill_llm.pipeline.place import free_disk, free_memory
    from distill_llm.pipeline.plan_time import seconds_of
    from distill_llm.pipeline.preview import preview_rationales

    memories = memories_of(recipe, ground)
    asks = recipe.rationales is not None and not recipe.rationales.knows_answers
    preview = preview_rationales(recipe) if asks else None
    limit, said = free_memory(ground.device, machine) if memory is None else (memory, "--memory")
    return Plan(
        recipe,
        ground.device,
        machine,
        limit,
        said,
        ground.rows,
        memories,
        disk_of(recipe, ground.rows, preview),
        free_disk(recipe.folder),
        preview,
        seconds_of(recipe, ground.rows, memories, preview, machine),
    )
