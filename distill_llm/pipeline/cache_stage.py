"""The stage between rationales and students: what cached teachers say of the training rows, written once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.cache.last_hidden import LastHidden
from distill_llm.cache.manifest import Manifest, make_manifest, must_match, write_manifest
from distill_llm.cache.payload import Said
from distill_llm.cache.shards import Shards, ShardWriter
from distill_llm.core.errors import ConfigError, DataError
from distill_llm.core.processes import main_first, my_share, rank
from distill_llm.core.schedule import Schedule
from distill_llm.models.load import LoadedModel, build_student, read_tokenizer
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.trial import open_teacher
from distill_llm.teachers.cached import HEAD, Cached

if TYPE_CHECKING:
    from distill_llm.core.progress import Progress
    from distill_llm.data.collate import Collator
    from distill_llm.data.rows import Row
    from distill_llm.recipe.recipe import Recipe
    from distill_llm.teachers.base import TensorTeacher

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What one cache has come to, over all processes; ``there`` are rows that stood in it before.

    ``captured_mass`` is the mean over the tokens of the probability of what is kept; None where that says nothing.
    ``known``: the share of the tokens of which something is kept; None where it is of all.
    """

    name: str
    folder: Path
    rows: int
    there: int
    tokens: int
    num_bytes: int
    captured_mass: float | None
    seconds: float
    known: float | None = None


@dataclass(frozen=True, slots=True)
class CachePlan:
    """A cached teacher of a recipe: its place, what it must be made of, and the rows that it is asked about."""

    name: str
    spec: Cached
    folder: Path
    manifest: Manifest
    rows: Mapping[int, Row]


def plan_caches(recipe: Recipe, rows: Sequence[Row], vocabulary: Mapping[str, int]) -> list[CachePlan]:
    """Those that some term asks; equal rows are one."""
    run, plans = RunFolder(recipe.folder), []
    for name, teacher in recipe.teachers.items():
        terms = [term for term in recipe.objective if name in _asked(recipe, term.teacher)]
        if not isinstance(teacher, Cached) or not terms:
            continue
        spec = teacher.placed(run.signals(name))
        assert isinstance(spec, Cached)
        targets = {target for term in terms for target in term.targets}
        temperatures = {getattr(term.loss, "temperature", 1.0) for term in terms}
        fixed = () if spec.gives_logits else tuple(sorted(t for t in temperatures if not isinstance(t, Schedule)))
        manifest = make_manifest(
            payload=spec.payload.model_dump(mode="json"),
            teacher=recipe.teachers[spec.of].identity(recipe.teachers),
            vocabulary=vocabulary,
            temperatures=fixed,
        )
        own = {row.key: row for row in rows if row.target in targets}
        plans.append(CachePlan(name, spec, Path(spec.folder).expanduser(), manifest, own))
    return plans


def _asked(recipe: Recipe, name: str | None) -> set[str]:
    """A term's teacher, and all that is opened for it."""
    if name is None or name not in recipe.teachers:  # a scheme may provide it
        return set()
    return {name}.union(*(_asked(recipe, member) for member in recipe.teachers[name].members()))


def missing_rows(plan: CachePlan) -> int:
    """How many of its rows are not in the cache; of one that is not there, all.

    Raises ConfigError where the cache is not that of the recipe, StorageError where it is damaged.
    """
    if must_match(plan.folder, plan.manifest) is None:
        return len(plan.rows)
    if isinstance(plan.spec.payload, LastHidden) and not (plan.folder / HEAD).exists():
        return len(plan.rows)
    return Shards(plan.folder).missing(plan.rows)


def require_caches(recipe: Recipe, rows: Sequence[Row], run: RunFolder) -> None:
    """Raises ConfigError where a cached teacher of the recipe cannot answer for every row."""
    for plan in plan_caches(recipe, rows, _vocabulary(run)) if _has_any(recipe) else ():
        missing = missing_rows(plan)
        if missing:
            raise ConfigError(
                f"teachers.{plan.name}: the cache in {plan.folder} lacks {missing:,} of {len(plan.rows):,} rows. First "
                "type: distill-llm cache-signals RECIPE (rows that are there are not computed again; `distill-llm run` "
                "does it by itself)."
            )


def write_caches(recipe: Recipe, rows: Sequence[Row], run: RunFolder, progress: Progress) -> list[CacheReport]:
    """Runs the teachers that cached ones are made of over the rows that are not in their caches yet.

    Under torchrun each process computes its share, into shards of its own; the main one reports.
    """
    from distill_llm.models.generate import default_device
    from distill_llm.training.train import collator_for

    if not _has_any(recipe):
        return []
    student: LoadedModel | None = None
    reports: list[CacheReport] = []
    for plan in plan_caches(recipe, rows, _vocabulary(run)):
        began = time.perf_counter()
        main_first(lambda plan=plan: _begin(plan))
        before = Shards(plan.folder)
        waiting = [row for key, row in plan.rows.items() if key not in before]
        if waiting or _lacks_head(plan):
            student = student or build_student(
                recipe.student.in_size(), read_tokenizer(str(run.tokenizer), where="student.tokenizer")
            )
            student.model.to(default_device())
            opened: dict[str, TensorTeacher] = {}
            teacher = open_teacher(recipe, plan.spec.of, student, opened)
            main_first(lambda plan=plan, teacher=teacher: _write_head(plan, teacher))
            share = my_share(sorted(waiting, key=lambda row: (row.target, -row.num_tokens)))
            batches = _batches(share, recipe.train.rows_per_batch, recipe.train.tokens_per_batch)
            _write(plan, teacher, collator_for(student, opened), list(batches), str(student.model.device), progress)
        there = len(plan.rows) - len(waiting)
        main_first(lambda plan=plan, there=there, began=began: reports.append(_report(plan, there, began)))
    return reports


def _has_any(recipe: Recipe) -> bool:
    return any(isinstance(teacher, Cached) for teacher in recipe.teachers.values())


def _vocabulary(run: RunFolder) -> dict[str, int]:
    return read_tokenizer(str(run.tokenizer), where="student.tokenizer").get_vocab()


def _begin(plan: CachePlan) -> None:
    if must_match(plan.folder, plan.manifest) is None:
        if plan.folder.exists() and any(plan.folder.iterdir()):
            raise ConfigError(
                f"teachers.{plan.name}.folder: {plan.folder} exists, is not empty, and is not a cache of signals. "
                "Choose another."
            )
        write_manifest(plan.folder, plan.manifest)


def _lacks_head(plan: CachePlan) -> bool:
    return isinstance(plan.spec.payload, LastHidden) and not (plan.folder / HEAD).exists()


def _write_head(plan: CachePlan, teacher: Any) -> None:
    if _lacks_head(plan):
        teacher.head().stored().save(plan.folder / HEAD)


def _batches(rows: Sequence[Row], most_rows: int, most_tokens: int) -> Iterator[list[Row]]:
    """Rows of about one length, in their order: at most so many, or, where ``most_tokens`` is given, of so many tokens
    with their padding."""
    batch: list[Row] = []
    for row in rows:
        width = max((one.num_tokens for one in [*batch, row]), default=0)
        full = (len(batch) + 1) * width > most_tokens if most_tokens else len(batch) == most_rows
        if batch and (full or row.target != batch[0].target):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _write(
    plan: CachePlan,
    teacher: TensorTeacher,
    collator: Collator,
    batches: Sequence[Sequence[Row]],
    device: str,
    progress: Progress,
) -> None:
    """Writes one process's rows, a batch at a time; a shard that is finished is kept when it is killed."""
    done, total = 0, sum(len(rows) for rows in batches)
    size = int(plan.spec.shard_megabytes * 2**20)
    writer = ShardWriter(plan.folder, shard_bytes=size, process=rank(), bfloat16=plan.spec.payload.bfloat16)
    name = f"signals of {plan.spec.of} ({plan.name})"
    progress.advance(name, 0, total)
    try:
        for rows in batches:
            columns = _columns(plan, teacher, rows, collator, device)
            start = 0
            for row in rows:
                stop = start + len(row.label_ids)
                writer.add(row.key, {column: values[start:stop] for column, values in columns.items()})
                start = stop
            done += len(rows)
            progress.advance(name, done, total)
    finally:
        writer.flush()  # also what was computed before an interrupt


def _columns(
    plan: CachePlan, teacher: TensorTeacher, rows: Sequence[Row], collator: Collator, device: str
) -> dict[str, Any]:
    """What is kept of the tokens of some rows, in row order."""
    import numpy as np
    import torch

    from distill_llm.models.head import AUTO_BYTES
    from distill_llm.teachers.ensemble import lazily

    payload, temperatures = plan.spec.payload, plan.manifest["temperatures"]
    batch = {name: column.to(device) for name, column in collator(rows).items()}
    with torch.no_grad():
        said = lazily(teacher, batch)
        if said.known is not None and not bool(said.known.all()):
            raise DataError(
                f"teachers.{plan.name}: {plan.spec.of} says nothing of some rows, which have no gold label to be told, "
                "and a cache has something of every row. Name that teacher in the objective itself, or give all labels."
            )
        hidden = said.hidden[said.tokens.rows.argsort(stable=True)]
        noise = payload.noise([row.key for row in rows], [len(row.label_ids) for row in rows], len(temperatures))
        at_once = max(1, AUTO_BYTES // (4 * plan.manifest["width"]))
        parts = [
            payload.encode(
                Said(
                    hidden[start : start + at_once],
                    said.make_logits,
                    temperatures,
                    None if noise is None else noise[start : start + at_once],
                )
            )
            for start in range(0, len(hidden), at_once)
        ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _report(plan: CachePlan, there: int, began: float) -> CacheReport:
    """Of what stands in the cache now, read back."""
    seconds = time.perf_counter() - began
    now, keys, tokens, masses = Shards(plan.folder), list(plan.rows), 0, []
    for start in range(0, len(keys), _ROWS_AT_ONCE):
        columns, counts = now.read(keys[start : start + _ROWS_AT_ONCE])
        tokens += sum(counts)
        masses.append(plan.spec.payload.captured_mass(columns))
    known = [mass for mass in masses if mass is not None]
    return CacheReport(
        name=plan.name,
        folder=plan.folder,
        rows=len(keys),
        there=there,
        tokens=tokens,
        num_bytes=now.num_bytes,
        captured_mass=sum(known) / tokens if known else None,
        seconds=seconds,
    )
