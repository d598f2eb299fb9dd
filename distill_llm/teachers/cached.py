"""What another teacher of the recipe said of the training rows, read from disk: that teacher is not run again.

N supervised tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from pydantic import Field

from distill_llm.cache.last_hidden import LastHidden
from distill_llm.cache.payload import Kept, Payload
from distill_llm.cache.top_k import TopK
from distill_llm.core.component import any_of
from distill_llm.core.errors import ConfigError, StorageError
from distill_llm.core.schedule import Schedule
from distill_llm.core.signals import Batch, LazySignals, Signals, aligned_labels, signals_of, tokens_of
from distill_llm.teachers.base import TensorTeacher, TensorTeacherSpec
from distill_llm.teachers.student import StudentFacts

if TYPE_CHECKING:
    from distill_llm.cache.shards import Array, Shards
    from distill_llm.core.sparse import SparseSignals
    from distill_llm.losses.base import TermLoss
    from distill_llm.models.stored_head import StoredHead

    AnyPayload: TypeAlias = Payload
else:
    AnyPayload = any_of(Payload, "distill_llm.cache")

HEAD = "head.safetensors"


class CachedWords:
    """Some words of each token, of rows that are found by their keys."""

    def __init__(self, shards: Shards, payload: Payload, *, width: int, temperatures: tuple[float, ...]):
        self.shards, self._payload = shards, payload
        self._width, self._temperatures = width, temperatures

    def signals(self, batch: Batch) -> SparseSignals:
        columns, about = _found(self.shards, batch)
        return self._payload.decode(Kept(columns, about, self._width, self._temperatures))


class CachedHidden:
    """The last hidden state of each token; ``head`` makes its logits."""

    def __init__(self, shards: Shards, payload: LastHidden, head: StoredHead):
        self.shards, self._payload, self._head = shards, payload, head

    def signals(self, batch: Batch) -> Signals:
        import torch

        columns, about = _found(self.shards, batch)
        hidden = self._payload.hidden_of(columns).to(about.token_ids.device)
        with torch.no_grad():
            return replace(about, logits=self._head(hidden))

    def lazy_signals(self, batch: Batch) -> LazySignals:
        """The same, without logits yet."""
        columns, about = _found(self.shards, batch)
        hidden = self._payload.hidden_of(columns).to(about.token_ids.device)
        by_target = about.targets.argsort(stable=True)  # the order of lazy tokens
        return LazySignals(
            tokens=tokens_of(batch),
            hidden=hidden[by_target],
            make_logits=self._head,
            weights=(),
            anchor=hidden[:0].float().sum(),
            chunk_tokens=max(1, len(hidden)),
        )


def _found(shards: Shards, batch: Batch) -> tuple[dict[str, Array], Signals]:
    """The columns of the batch's supervised tokens in row order, and which tokens these are: signals of no word."""
    labels = aligned_labels(batch)
    about = signals_of(labels.new_zeros((*labels.shape, 0)).float(), batch)
    columns, counts = shards.read(batch["keys"].tolist())
    if sum(counts) != len(about.token_ids):
        raise StorageError(
            f"{shards.folder}: the cache has {sum(counts)} tokens for rows that have {len(about.token_ids)}. It was "
            "written for other rows: delete it, and type: distill-llm cache-signals RECIPE."
        )
    return columns, about


class Cached(TensorTeacherSpec):
    """What another teacher of the recipe said of the training rows, written once by `cache-signals`.

    That teacher is not loaded for training: of `last_hidden` its head is, of the other payloads nothing.
    """

    manner: ClassVar[frozenset[str]] = frozenset({"folder", "shard_megabytes"})
    asked_once: ClassVar[bool] = True
    instead_of_mixing: ClassVar[str] = "Let the cache be of the ensemble, or keep `payload: {kind: last_hidden}`"
    kind: Literal["cached"] = "cached"
    has_layers: ClassVar[bool] = False
    of: str = Field(min_length=1, description="name of another teacher of the recipe")
    payload: AnyPayload = Field(default=TopK(), description="what is kept of each token")
    folder: str = Field(
        default="", description="where it lies, which several runs may share; empty: signals/NAME in the run folder"
    )
    shard_megabytes: float = Field(
        default=64, gt=0, description="size of one file: what is computed again after a kill, at most"
    )

    def made_of(self) -> tuple[str, ...]:
        return (self.of,)

    @property
    def gives_logits(self) -> bool:
        return self.payload.gives_logits

    def check_others(self, others: Mapping[str, TensorTeacherSpec]) -> None:
        super().check_others(others)
        for name in _all_of(others, self.of):
            if others[name].moves:
                raise ValueError(f"{name} changes while the student learns, and cannot be written down beforehand")
            if others[name].asked_once:
                raise ValueError(f"{name} is a cache already: name the teacher that it is made of")
        if isinstance(self.payload, LastHidden) and not others[self.of].has_head:
            raise ValueError(
                f"last_hidden needs the head of one model, and {self.of} is made of several. Take `payload: {{kind: "
                "top_k}`"
            )

    def check_loss(self, loss: TermLoss) -> None:
        super().check_loss(loss)
        payload = self.payload.kind  # pyright: ignore[reportAttributeAccessIssue]  # each has one
        if self.gives_logits:
            return
        if payload not in loss.takes:
            takers = "forward_kl" if payload == "sampled" else "a loss between distributions, such as forward_kl"
            raise ValueError(
                f"{type(loss).model_fields['kind'].default} cannot be computed from a cache of {payload}. Take "
                f"{takers}, or `payload: {{kind: last_hidden}}`, which keeps all words"
            )
        if isinstance(getattr(loss, "temperature", 1.0), Schedule):
            raise ValueError(
                f"a cache of {payload} is written for the temperatures that the recipe names, and cannot follow a "
                "schedule. Set a number, or take `payload: {kind: last_hidden}`"
            )

    def placed(self, folder: Path) -> TensorTeacherSpec:
        return self if self.folder else self.model_copy(update={"folder": str(folder)})

    def open(self, student: StudentFacts, members: Sequence[TensorTeacher] = ()) -> TensorTeacher:
        from distill_llm.cache.manifest import read_manifest
        from distill_llm.cache.shards import Shards
        from distill_llm.models.stored_head import load_head

        folder = Path(self.folder).expanduser()
        manifest = read_manifest(folder)
        if manifest is None:
            raise ConfigError(
                f"{folder}: there is no cache of signals here. First type: distill-llm cache-signals RECIPE"
            )
        shards = Shards(folder)
        if isinstance(self.payload, LastHidden):
            return CachedHidden(shards, self.payload, load_head(folder / HEAD, student.device))
        temperatures = tuple(manifest["temperatures"])
        return CachedWords(shards, self.payload, width=manifest["width"], temperatures=temperatures)

    def num_parameters(self, student_parameters: int) -> int:
        return 0


def _all_of(others: Mapping[str, TensorTeacherSpec], name: str) -> list[str]:
    """A teacher, and all that it is made of."""
    return [name, *(below for member in others[name].made_of() for below in _all_of(others, member))]
