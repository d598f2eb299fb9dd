"""Teachers on disk before there is a disk: what a cache would give back, in shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.cache.last_hidden import LastHidden
from distill_llm.cache.payload import Payload, Said
from distill_llm.cache.top_k import TopK
from distill_llm.core.schedule import Schedule
from distill_llm.models.load import load_model, read_config
from distill_llm.pipeline.views import targets_asked
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.cached import Cached, CachedHidden, CachedWords
from distill_llm.teachers.captured import TEMPERATURE, Captured

if TYPE_CHECKING:
    from distill_llm.cache.shards import Columns
    from distill_llm.data.rows import Row
    from distill_llm.models.dry_run import DryRun
    from distill_llm.teachers.base import TensorTeacher

_KEY_BYTES = 12  # of a row's key and its number of tokens


@dataclass(frozen=True, slots=True)
class CachedShapes:
    """What a cache keeps: ``one`` are the columns of one token, ``counts`` the tokens of each row by its key.

    ``head`` names the model whose head stands beside last hidden states, with its revision.
    """

    payload: Payload
    one: Columns
    counts: Mapping[int, int]
    width: int
    temperatures: tuple[float, ...]
    head: tuple[str, str] | None = None
    folder: Path = Path()

    @property
    def num_bytes(self) -> int:
        """On disk, for the rows that were counted; a head comes on top."""
        a_token = sum(column.nbytes for column in self.one.values())
        return a_token * sum(self.counts.values()) + _KEY_BYTES * len(self.counts)

    def read(self, keys: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
        """As ``Shards.read``."""
        import numpy as np

        counts = [self.counts[key] for key in keys]
        return {name: np.repeat(column, sum(counts), axis=0) for name, column in self.one.items()}, counts

    def teacher(self, run: DryRun) -> TensorTeacher:
        """As training opens it; within a dry run."""
        shards: Any = self
        if not isinstance(self.payload, LastHidden):
            return CachedWords(shards, self.payload, width=self.width, temperatures=self.temperatures)
        from distill_llm.models.stored_head import take_head

        assert self.head is not None
        model = load_model(*self.head, where="teachers: cached", dtype="auto")
        head = take_head(model, self.width, where="teachers: cached")
        run.mark(head.weight, "teachers")
        return CachedHidden(shards, self.payload, head)


def cached_shapes(recipe: Recipe, rows: Sequence[Row], tokenizer: Any) -> dict[str, CachedShapes]:
    """Of each teacher that is asked once and named by some term, by name. ``tokenizer``: the student's. Outside of a
    dry run."""
    width = max(tokenizer.get_vocab().values()) + 1
    found = {}
    for name, spec in recipe.teachers.items():
        targets = targets_asked(recipe, name)
        if not targets or not isinstance(spec, Cached | Captured):
            continue
        counts = {row.key: len(row.label_ids) for row in rows if row.target in targets}
        if isinstance(spec, Cached):
            payload, temperatures = spec.payload, _temperatures(recipe, name)
            head = _head_of(recipe, spec) if isinstance(payload, LastHidden) else None
        else:
            assert recipe.rationales is not None
            payload, temperatures, head = TopK(k=recipe.rationales.sampling.top_logprobs), (TEMPERATURE,), None
        hidden = _hidden_size(*head) if head is not None else 1
        one = _one_token(payload, width, hidden, temperatures)
        found[name] = CachedShapes(payload, one, counts, width, temperatures, head)
    return found


def _temperatures(recipe: Recipe, name: str) -> tuple[float, ...]:
    asked = {getattr(term.loss, "temperature", 1.0) for term in recipe.objective if term.teacher == name}
    return tuple(sorted(one for one in asked if not isinstance(one, Schedule))) or (1.0,)


def _head_of(recipe: Recipe, spec: Cached) -> tuple[str, str]:
    of: Any = recipe.teachers[spec.of]
    return of.model, of.revision


def _hidden_size(model: str, revision: str) -> int:
    text = read_config(model, revision, where="teachers: cached").get_text_config(decoder=True)
    return text.hidden_size


def _one_token(payload: Payload, width: int, hidden: int, temperatures: tuple[float, ...]) -> Columns:
    import torch

    said = Said(
        torch.zeros(1, hidden),
        lambda _: torch.zeros(1, width),
        temperatures,
        payload.noise([0], [1], len(temperatures)),
    )
    return payload.encode(said)


def head_bytes(shapes: CachedShapes) -> int:
    """Of the head that lies beside last hidden states."""
    if shapes.head is None:
        return 0
    config = read_config(*shapes.head, where="teachers: cached")
    stored = str(getattr(config, "dtype", None) or "float32")
    return shapes.width * _hidden_size(*shapes.head) * (4 if "32" in stored else 2)
