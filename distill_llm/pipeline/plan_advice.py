"""What to change where a recipe does not fit: overrides, each planned anew."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from unittest.mock import patch

from distill_llm.core.errors import DistillError
from distill_llm.pipeline.heap_model import VARIABLE
from distill_llm.pipeline.planner import Ground, Plan, memories_of
from distill_llm.schemes.on_policy import OnPolicy
from distill_llm.teachers.base import with_members
from distill_llm.teachers.frozen import Frozen
from distill_llm.teachers.transformers import Transformers

if TYPE_CHECKING:
    from distill_llm.recipe.recipe import Recipe

_WORTH = 0.1  # of the peak, from which on the gaps are worth a word
_FEWEST_ROWS = 1 / 64  # of those that the recipe has in a micro-batch


@dataclass(frozen=True, slots=True)
class Advice:
    """``peak`` in bytes, with all of ``overrides`` together; ``changes``: what is learned, or how well, may differ.

    ``environment``: NAME=VALUE, to stand before the command.
    """

    overrides: tuple[str, ...]
    why: str
    changes: bool
    peak: int
    fits: bool
    environment: str = ""


@dataclass(frozen=True, slots=True)
class _Try:
    overrides: tuple[str, ...]
    why: str
    changes: bool = False
    environment: str = ""


def advise(plan: Plan, ground: Ground, load: Callable[[Sequence[str]], Recipe]) -> list[Advice]:
    """Each change alone, those that leave what is learned as it is first; then, if none of them is enough, all that
    help, one upon the other, until the recipe fits. ``load`` gives the recipe with further overrides."""
    before = plan.memories.peak.total
    found: list[Advice] = []
    for one in (*_of_malloc(plan), *_tries(plan.recipe)):
        advice = _verified(one, ground, load, plan.limit)
        if advice is not None and advice.peak < 0.99 * before:
            found.append(advice)
    if any(one.fits for one in found) or len(found) < 2:
        return found
    together = _Try((), "all of these")
    best: Advice | None = None
    for one in found:
        if _same_keys(one.overrides, together.overrides):
            continue
        together = replace(
            together,
            overrides=(*together.overrides, *one.overrides),
            changes=together.changes or one.changes,
            environment=together.environment or one.environment,
        )
        advice = _verified(together, ground, load, plan.limit)
        if advice is not None and advice.peak < (best.peak if best is not None else before):
            best = advice
            if advice.fits:
                break
    return found if best is None else [*found, best]


def _verified(one: _Try, ground: Ground, load: Callable[[Sequence[str]], Recipe], limit: int) -> Advice | None:
    """None where the recipe could not be had so."""
    name, _, value = one.environment.partition("=")
    try:
        recipe = load(one.overrides).resolved()
        with patch.dict(os.environ, {name: value} if name else {}):
            peak = memories_of(recipe, ground).peak.total
    except DistillError:
        return None
    return Advice(one.overrides, one.why, one.changes, peak, peak <= limit, one.environment)


def _same_keys(some: Sequence[str], others: Sequence[str]) -> bool:
    keys = {other.partition("=")[0] for other in others}
    return any(one.partition("=")[0] in keys for one in some)


def _of_malloc(plan: Plan) -> Iterator[_Try]:
    """Blocks above 1 MiB given back at once: no gaps are left, and each costs page faults."""
    peak = plan.memories.peak
    if peak.parts.get("gaps between tensors", 0) * peak.processes > _WORTH * peak.total and VARIABLE not in os.environ:
        why = "no gaps between tensors, for a slower step (docs/benchmarks.md)"
        yield _Try((), why, environment=f"{VARIABLE}=1048576")


def _tries(recipe: Recipe) -> Iterator[_Try]:
    yield from _of_the_loss(recipe)
    yield from _of_batches(recipe)
    yield from _of_teachers(recipe)
    yield from _of_writing(recipe)
    yield from _of_the_student(recipe)


def _of_the_loss(recipe: Recipe) -> Iterator[_Try]:
    train = recipe.train
    if train.chunk_tokens == 0:
        yield _Try(("train.chunk_tokens=auto",), "logits of a chunk at a time")
    if train.workers > 1:
        yield _Try(("train.workers=1",), "one training at a time")


def _of_batches(recipe: Recipe) -> Iterator[_Try]:
    """The same step in smaller pieces."""
    train = recipe.train
    if train.tokens_per_batch:
        for part in (2, 4, 8):
            yield _Try((f"train.tokens_per_batch={train.tokens_per_batch // part}",), "smaller micro-batches")
    else:
        rows = min(train.rows_per_batch, train.rows_per_step)
        for part in (2, 4, 16):
            if rows % part == 0 and rows // part >= max(1, _FEWEST_ROWS * rows):
                yield _Try((f"train.rows_per_batch={rows // part}",), "smaller micro-batches")
    if recipe.evaluate.batch_rows > 16:
        yield _Try(("evaluate.batch_rows=16",), "fewer rows answered at once")
    if not train.gradient_checkpointing:
        yield _Try(("train.gradient_checkpointing=true",), "activations computed twice, not kept")
    if train.precision == "float32":
        yield _Try(("train.precision=auto",), "bfloat16 where the machine has it", changes=True)


def _of_teachers(recipe: Recipe) -> Iterator[_Try]:
    if isinstance(recipe.scheme, OnPolicy):
        return
    for name, spec in recipe.teachers.items():
        named = any(name == term.teacher for term in recipe.objective)
        if not isinstance(spec, Frozen):
            continue
        alone = not any(name in other.made_of() for other in recipe.teachers.values())
        if named and alone and spec.own_view() is None and _takes_top_k(recipe, name):
            live = f"{name}_live"
            moved = json.dumps(spec.model_dump(mode="json", exclude_defaults=True) | {"kind": "frozen"})
            cached = json.dumps({"kind": "cached", "of": live})
            yield _Try(
                (f"teachers.{live}={moved}", f"teachers.{name}={cached}"),
                "what the teacher says is written down once: it is not there while the student is trained",
                changes=True,
            )
        if spec.load_in == "full" and spec.dtype in ("auto", "float32"):
            yield _Try((f"teachers.{name}.dtype=bfloat16",), "half of the teacher", changes=True)


def _takes_top_k(recipe: Recipe, name: str) -> bool:
    terms = [term for term in recipe.objective if name in with_members(recipe.teachers, term.teacher or "")]
    return all("top_k" in getattr(term.loss, "takes", ()) for term in terms)


def _of_writing(recipe: Recipe) -> Iterator[_Try]:
    if recipe.rationales is None:
        return
    for voice in recipe.rationales.voices:
        spec = voice.teacher
        if not isinstance(spec, Transformers):
            continue
        for part in (2, 8):
            if spec.batch_rows >= 2 * part:
                yield _Try((f"{voice.where}.batch_rows={spec.batch_rows // part}",), "fewer rationales at once")
        if spec.load_in == "full" and spec.dtype in ("auto", "float32"):
            yield _Try((f"{voice.where}.dtype=bfloat16",), "half of the teacher", changes=True)
        if spec.load_in == "full":
            yield _Try((f"{voice.where}.load_in=4bit",), "an eighth of the teacher (bitsandbytes)", changes=True)


def _of_the_student(recipe: Recipe) -> Iterator[_Try]:
    """These change what is learned, and want other learning rates."""
    student, train = recipe.student, recipe.train
    if student.model and student.lora is None and student.picture is None:
        lora = "student.lora={rank: 16}"
        yield _Try((lora,), "adapters are trained, the weights stay (LoRA)", changes=True)
        yield _Try((lora, "student.load_in=4bit"), "the same on weights of 4 bits (QLoRA, bitsandbytes)", changes=True)
    elif student.lora is not None and student.load_in == "full":
        yield _Try(
            ("student.load_in=4bit",), "weights of 4 bits below the adapters (QLoRA, bitsandbytes)", changes=True
        )
    if train.optimizer == "adamw" and student.lora is None:
        yield _Try(("train.optimizer=adafactor",), "no two states a weight; find its learning rate", changes=True)


def in_order(advice: Sequence[Advice]) -> list[Advice]:
    """What fits first; of it what leaves the result as it is, then the smallest change of the peak."""
    return sorted(advice, key=lambda one: (not one.fits, one.changes, -one.peak if one.fits else one.peak))
