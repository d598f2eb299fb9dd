"""Signals that came with the rationales: found in the data set, aligned with the training rows, written as a cache.

No model is asked, so that it is done whenever it is needed: before a training too.
"""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.cache.captured import captured_columns
from distill_llm.cache.manifest import Manifest, make_manifest, must_match, read_manifest, write_manifest
from distill_llm.cache.shards import Shards, ShardWriter
from distill_llm.cache.top_k import TopK
from distill_llm.core.errors import ConfigError, DataError
from distill_llm.core.files import fingerprint
from distill_llm.data.alignment import places_in_completion
from distill_llm.models.load import read_tokenizer
from distill_llm.pipeline.cache_stage import CacheReport
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.views import targets_asked
from distill_llm.rationales.captured import Heard, kept_keys, read_heard
from distill_llm.teachers.captured import TEMPERATURE, Captured

if TYPE_CHECKING:
    from distill_llm.core.example import Example
    from distill_llm.data.rows import Row
    from distill_llm.recipe.recipe import Recipe
    from distill_llm.teachers.base import TextTeacherSpec

_SHARD_BYTES = 2**26
_ROWS_AT_ONCE = 1024
_SHOWN = 8  # tokens of each side, where none is the other's counterpart


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """A captured teacher of a recipe: its place, what it must be made of, and its rows by completion."""

    name: str
    teacher: TextTeacherSpec
    folder: Path
    manifest: Manifest
    rows: Mapping[str, Sequence[Row]]

    @property
    def keys(self) -> list[int]:
        return list({row.key: None for rows in self.rows.values() for row in rows})


def write_captures(
    recipe: Recipe, rows: Sequence[Row], examples: Sequence[Example], run: RunFolder
) -> list[CacheReport]:
    """Writes what is not there yet, or is of other rationales; ``rows`` are those of ``examples``.

    For one process: the others wait.
    """
    if not captured_teachers(recipe):
        return []
    tokenizer = read_tokenizer(str(run.tokenizer), where="student.tokenizer")
    return [
        write_capture(plan, run.rationales("train"), tokenizer)
        for plan in plan_captures(recipe, rows, examples, run, tokenizer)
    ]


def captured_teachers(recipe: Recipe) -> list[str]:
    """Those that some term asks."""
    teachers = recipe.teachers.items()
    return [name for name, teacher in teachers if isinstance(teacher, Captured) and targets_asked(recipe, name)]


def plan_captures(
    recipe: Recipe, rows: Sequence[Row], examples: Sequence[Example], run: RunFolder, tokenizer: Any
) -> list[CapturePlan]:
    names = captured_teachers(recipe)
    if not names:
        return []
    assert recipe.rationales is not None, "the recipe was checked"
    teacher = recipe.rationales.teacher
    vocabulary = tokenizer.get_vocab()
    kept = kept_keys(run.rationales("train"))
    manifest = make_manifest(
        payload={"kind": "captured", "k": min(recipe.rationales.sampling.top_logprobs, max(vocabulary.values()) + 1)},
        teacher={"completions": fingerprint([[example.id, kept.get(example.id, [])] for example in examples])},
        vocabulary=vocabulary,
        temperatures=(TEMPERATURE,),
    )
    return [
        CapturePlan(
            name,
            teacher,
            run.signals(name),
            manifest,
            _by_completion(rows, targets_asked(recipe, name), examples, kept),
        )
        for name in names
    ]


def _by_completion(
    rows: Sequence[Row], targets: frozenset[str], examples: Sequence[Example], kept: Mapping[str, Sequence[str]]
) -> dict[str, list[Row]]:
    """The n-th row of an example and a target is made of the n-th rationale that was kept."""
    of_example: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.target in targets:
            of_example[row.example, row.target].append(row)
    found: dict[str, list[Row]] = defaultdict(list)
    for (index, _), own in of_example.items():
        for row, key in zip(own, kept[examples[index].id], strict=True):
            found[key].append(row)
    return dict(found)


def _must_share(theirs: Mapping[str, int], ours: Mapping[str, int], name: str) -> None:
    if theirs == ours:
        return
    different = [word for word, index in ours.items() if theirs.get(word) != index]
    raise ConfigError(
        f"teachers.{name}: the rationales' teacher and the student have different vocabularies ({len(theirs):,} and "
        f"{len(ours):,} entries; {len(different):,} of the student's are missing or elsewhere, such as "
        f"{different[:3]}), so that the ids it captured are other words. Give the student the teacher's tokenizer "
        "(`student.tokenizer`), or name a frozen teacher with `own_tokenizer: true` and the loss universal_logit."
    )


def write_capture(plan: CapturePlan, data: Path, tokenizer: Any) -> CacheReport:
    """Writes a plan's rows from the data set ``data``, all anew where it is of other rationales or lacks one.

    Raises ConfigError where the teacher's words are not the student's, DataError where no token is found again.
    """
    began = time.perf_counter()
    there = _is_there(plan)
    if not there:
        _must_share(plan.teacher.vocabulary(), tokenizer.get_vocab(), plan.name)
        shutil.rmtree(plan.folder, ignore_errors=True)
        _write(plan, data, tokenizer)
        write_manifest(plan.folder, plan.manifest)  # last: without it nothing is there
    return _report(plan, there, began)


def _is_there(plan: CapturePlan) -> bool:
    """Raises ConfigError where the folder is a cache that a teacher was run for."""
    manifest = read_manifest(plan.folder)
    if manifest is None:
        return False
    if manifest["payload"].get("kind") != "captured":
        must_match(plan.folder, plan.manifest)
    return manifest == plan.manifest and Shards(plan.folder).missing(plan.keys) == 0


def _write(plan: CapturePlan, data: Path, tokenizer: Any) -> None:
    width, k = plan.manifest["width"], plan.manifest["payload"]["k"]
    writer = ShardWriter(plan.folder, shard_bytes=_SHARD_BYTES)
    done: set[int] = set()
    example: tuple[Row, Heard] | None = None
    matched = 0
    for heard in read_heard(data, k):
        for row in plan.rows.get(heard.key, ()):
            if row.key in done:  # two completions of one text: the first is as good
                continue
            places = _places(row, heard, tokenizer)
            writer.add(row.key, captured_columns(heard.top_words, heard.log_probs, places, width=width))
            done.add(row.key)
            matched += sum(place >= 0 for place in places)
            example = example or (row, heard)
    if not matched:
        raise DataError(_nothing_found(plan.name, example, tokenizer))
    writer.flush()


def _places(row: Row, heard: Heard, tokenizer: Any) -> list[int]:
    """The end of the sequence is nobody's: what was captured ends before it, or goes on with an answer."""
    ids = list(row.label_ids)
    ends = ids[-1:] == [tokenizer.eos_token_id]
    body = ids[:-1] if ends else ids
    return places_in_completion(body, heard.tokens, tokenizer) + [-1] * ends


def _nothing_found(name: str, example: tuple[Row, Heard] | None, tokenizer: Any) -> str:
    if example is None:
        return (
            f"teachers.{name}: no kept rationale has log-probabilities. Choose another run_dir, or delete the run "
            "folder's rationales to ask again."
        )
    row, heard = example
    ours, theirs = (
        tokenizer.convert_ids_to_tokens(list(ids)[:_SHOWN], skip_special_tokens=False)
        for ids in (row.label_ids, heard.tokens)
    )
    return (
        f"teachers.{name}: no token of a rationale is one that its teacher wrote. A row of the student's begins with "
        f"{ours} (its tokenizer's), the completion with {theirs} (as the teacher generated it). Name a frozen teacher "
        "with a `view`, which reads the rationales as the student does."
    )


def _report(plan: CapturePlan, there: bool, began: float) -> CacheReport:
    """Of what stands in the cache now, read back; the captured mass is that of known tokens."""
    now, keys, payload = Shards(plan.folder), plan.keys, TopK()
    tokens, known, mass = 0, 0, 0.0
    for start in range(0, len(keys), _ROWS_AT_ONCE):
        columns, _ = now.read(keys[start : start + _ROWS_AT_ONCE])
        said = columns["known"].astype(bool)
        tokens, known = tokens + len(said), known + int(said.sum())
        mass += payload.captured_mass({"log_probs": columns["log_probs"][said]}) or 0.0
    return CacheReport(
        name=plan.name,
        folder=plan.folder,
        rows=len(keys),
        there=len(keys) if there else 0,
        tokens=tokens,
        num_bytes=now.num_bytes,
        captured_mass=mass / max(known, 1),
        seconds=time.perf_counter() - began,
        known=known / max(tokens, 1),
    )
