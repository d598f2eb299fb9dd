"""How long a recipe will take, by the work of its parts and the speed of a machine."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill_llm.pipeline.memory_model import WritingCosts
    from distill_llm.pipeline.plan_rows import PlanRows
    from distill_llm.pipeline.planner import Memories, StagePlan
    from distill_llm.pipeline.preview import Preview
    from distill_llm.pipeline.time_model import Machine
    from distill_llm.recipe.recipe import Recipe


def seconds_of(
    recipe: Recipe, rows: PlanRows, memories: Memories, preview: Preview | None, machine: Machine
) -> dict[str, float]:
    """Of each thing done; texts are taken to be as long as they may be. What a served teacher takes is not known."""
    from distill_llm.pipeline.planner import arms_of

    found: dict[str, float] = {}
    for part in preview.splits if preview is not None else ():
        split, _, name = part.split.partition(", ")
        costs = memories.writing.get(name or "teacher")
        if costs is not None:
            batch = _batch_rows(recipe, name)
            left = ceil((part.requests - part.answered) / batch)
            tokens = part.most_tokens_out // max(1, part.requests - part.answered)
            writer = f"{name or 'teacher'} writes rationales: {split}"
            found[writer] = left * _written(costs, tokens, machine, bfloat16=False)
    stages = {stage.arm.name: stage for stage in memories.stages}
    student = memories.stages[-1]
    for arm in arms_of(recipe, rows):
        stage = stages.get(arm.name, student)
        steps = arm.max_steps * (len(recipe.train.tune) if recipe.train.tune and arm.validated else 1)
        share = 1.0 if arm.name in stages else _share(arm.targets, rows)
        found[f"{arm.name.replace('_', ' ')} is trained"] = steps * share * step_seconds(stage, machine)
        checks = 10 if not recipe.train.validate_every else arm.max_steps // recipe.train.validate_every
        if stage.validation is not None:
            answered = ceil(stage.validated_rows / recipe.evaluate.batch_rows)
            tokens = recipe.evaluate.max_new_tokens or recipe.train.max_target_tokens
            each = answered * _written(stage.validation, tokens, machine, bfloat16=False)
            found[f"{arm.name.replace('_', ' ')} is validated"] = checks * each
    return found


def step_seconds(stage: StagePlan, machine: Machine) -> float:
    """Of an optimiser step with micro-batches of mean size."""
    costs = stage.costs
    bfloat16 = costs.computes_in == "bfloat16"
    batch = machine.seconds(costs.batch, bfloat16=bfloat16)
    return costs.batches_a_step * batch + machine.seconds(costs.update, bfloat16=False)


def _written(costs: WritingCosts, tokens: int, machine: Machine, *, bfloat16: bool) -> float:
    read = machine.seconds(costs.read, bfloat16=bfloat16)
    return read + tokens * machine.seconds(costs.step, bfloat16=bfloat16)


def _batch_rows(recipe: Recipe, name: str) -> int:
    assert recipe.rationales is not None
    voice = next(one for one in recipe.rationales.voices if one.name == name)
    return getattr(voice.teacher, "batch_rows", 1)


def _share(targets: tuple[str, ...], rows: PlanRows) -> float:
    """Tokens of a row with these targets, of one of all targets."""
    own = [row.num_tokens for row in rows.rows if row.target in targets]
    everything = [row.num_tokens for row in rows.rows]
    return (sum(own) / max(1, len(own))) / (sum(everything) / max(1, len(everything)))
