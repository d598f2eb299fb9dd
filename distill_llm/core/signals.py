"""What one model says about the supervised tokens of a batch. The only place that shifts and masks.

B rows, T positions, N supervised tokens, M of them, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from distill_llm.core.example import TARGETS
from distill_llm.core.features import Features, Side
from distill_llm.core.layout import INPUT, PACKED, is_layout, packed_layout, part_tokens_for, parts_layout

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

Batch = dict[str, Any]
"""Columns ``input_ids``, ``attention_mask``, ``labels`` [B, T], ``targets`` [B] (index into TARGETS, plus OWN where the
text is the student's own), ``agreement`` [B] (of the votes, 1 without any); ``keys`` [B] (of the rows) where signals on
disk are found by them; ``decoder_input_ids`` [B, T] where the model is an encoder-decoder. One that reads pictures has
``pixel_values`` [B, C, H, W] in place of the first two. A teacher with a view of its own has columns of its own
(``view_column``), ``places`` [B, L] among them: for each label token of the row, which of the teacher's is its
counterpart, -1 for none."""

IGNORE_INDEX = -100
OWN = len(TARGETS)
"""Stands on top of a row's target where the student itself wrote the text. Such rows are targets of their own: what is
right is not known there, so that only terms with a teacher own them."""
_VIEW = "view."
_BOOKKEEPING = ("labels", "targets", "agreement", "keys", "places", INPUT)
_PIXELS = "pixel_values"
_VIEWED = ("input_ids", "attention_mask", _PIXELS, "labels", "decoder_input_ids", "places")

At = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""Takes what a model gave back for a batch, rows and columns, and gives what belongs to these tokens."""


@dataclass(frozen=True, slots=True)
class Signals:
    """One model's outputs at N supervised tokens, in row order. ``agreement`` is that of the token's row.

    ``features`` are of the whole batch, and stay whole in a part of the tokens. ``known``: whether a teacher says
    anything of the token, or its logits mean nothing; None where it does of all.
    """

    logits: Float[Tensor, "N V"]
    token_ids: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]
    agreement: Float[Tensor, " N"] | None = None
    features: Mapping[Side, Features] = field(default_factory=dict)
    known: Bool[Tensor, " N"] | None = None

    def where(self, keep: Bool[Tensor, " N"]) -> Signals:
        return self if bool(keep.all()) else self._picked(keep)

    def narrowed(self, width: int) -> Signals:
        """Over the first ``width`` words alone: heads may be padded beyond the tokenizer, each model's by its own."""
        return self if self.logits.size(-1) == width else replace(self, logits=self.logits[:, :width])

    def of_target(self, target: int) -> Signals:
        """The tokens of one target (as in the column ``targets``), in row order."""
        return self.where(self.targets == target)

    def part(self, start: int, stop: int) -> Signals:
        """The tokens from ``start`` on, up to ``stop``."""
        return self._picked(slice(start, stop))

    def _picked(self, which: Any) -> Signals:
        columns = {own.name: getattr(self, own.name) for own in fields(self) if own.name != "features"}
        return replace(self, **{name: column[which] for name, column in columns.items() if column is not None})


@dataclass(frozen=True, slots=True)
class Tokens:
    """The N supervised tokens of a batch, those of one target together, in row order within it.

    The logits that predict a token stand at its ``rows`` and ``columns``. ``spans`` says from where to where each
    target goes (as in the column ``targets``; those without a token are left out), and is known without asking the
    device again.
    """

    rows: Int[Tensor, " N"]
    columns: Int[Tensor, " N"]
    token_ids: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]
    spans: Mapping[int, tuple[int, int]]
    agreement: Float[Tensor, " N"] | None = None


@dataclass(frozen=True, slots=True)
class LazySignals:
    """Signals whose logits are made where they are used, a few tokens at a time: all of them would not fit.

    ``weights`` are those of the head that learn. ``anchor`` is a zero through which each weight gets a gradient where
    no term has a token. ``chunk_tokens`` says how many tokens at once. ``features`` and ``known`` are as in Signals.
    """

    tokens: Tokens
    hidden: Float[Tensor, "N D"]
    make_logits: Callable[[Tensor], Tensor]
    weights: tuple[Tensor, ...]
    anchor: Float[Tensor, ""]
    chunk_tokens: int
    features: Mapping[Side, Features] = field(default_factory=dict)
    known: Bool[Tensor, " N"] | None = None

    def said(self, start: int, stop: int, hidden: Float[Tensor, "M D"]) -> Signals:
        """The tokens from ``start`` on, up to ``stop``, as the head reads them from ``hidden``."""
        tokens = self.tokens
        agreement = None if tokens.agreement is None else tokens.agreement[start:stop]
        known = None if self.known is None else self.known[start:stop]
        logits = self.make_logits(hidden)
        return Signals(logits, tokens.token_ids[start:stop], tokens.targets[start:stop], agreement, known=known)

    def of_target(self, target: int) -> TargetSignals:
        """The tokens of one target (as in the column ``targets``)."""
        return TargetSignals(self, self.tokens.spans[target][0])


@dataclass(frozen=True, slots=True)
class TargetSignals:
    """The tokens of one target, which begin at ``first``; their logits are still to be made."""

    signals: LazySignals
    first: int

    def part(self, start: int, stop: int) -> Signals:
        """The tokens from ``start`` on, up to ``stop``, counted from the target's first."""
        start, stop = self.first + start, self.first + stop
        return self.signals.said(start, stop, self.signals.hidden[start:stop])


def all_at_once(said: LazySignals) -> Signals:
    """The same with all logits made, in row order, as signals are that were never lazy."""
    tokens = said.tokens
    order = (tokens.rows * (tokens.columns.amax() + 1) + tokens.columns).argsort() if len(tokens.rows) else tokens.rows
    whole = said.said(0, len(tokens.rows), said.hidden)
    return replace(whole._picked(order), features=said.features)


def aligned_labels(batch: Batch) -> Int[Tensor, "B T"]:
    """Labels as the logits see them: shifted by one for a decoder-only batch."""
    return batch["labels"] if "decoder_input_ids" in batch else batch["labels"][:, 1:]


def signals_of(logits: Float[Tensor, "B T V"], batch: Batch, at: At | None = None) -> Signals:
    """The supervised tokens of a pass; ``at`` finds their logits where these are not laid out like the batch."""
    labels = aligned_labels(batch)
    keep = labels != IGNORE_INDEX
    return Signals(
        logits=logits[:, : labels.size(1)][keep] if at is None else at(logits, *keep.nonzero(as_tuple=True)),
        token_ids=labels[keep],
        targets=batch["targets"][:, None].expand_as(labels)[keep],
        agreement=batch["agreement"][:, None].expand_as(labels)[keep] if "agreement" in batch else None,
    )


def tokens_of(batch: Batch) -> Tokens:
    """Where the supervised tokens of a batch stand; the device is asked once."""
    import torch

    labels = aligned_labels(batch)
    targets = batch["targets"][:, None].expand_as(labels).where(labels != IGNORE_INDEX, 2 * OWN).flatten()
    sizes = torch.stack([(targets == target).sum() for target in range(2 * OWN)]).tolist()
    places = targets.argsort(stable=True)[: sum(sizes)]
    rows = places.div(labels.size(1), rounding_mode="floor")
    stops = list(accumulate(sizes))
    return Tokens(
        rows=rows,
        columns=places % labels.size(1),
        token_ids=labels.flatten()[places],
        targets=targets[places],
        spans={
            target: (stop - size, stop) for target, (size, stop) in enumerate(zip(sizes, stops, strict=True)) if size
        },
        agreement=batch["agreement"][rows] if "agreement" in batch else None,
    )


def input_tokens_of(batch: Batch) -> Tokens:
    """Where the input's tokens stand, in row order, as an encoder's layers have them; nothing is supervised there."""
    there = batch["attention_mask"].bool()
    rows, columns = there.nonzero(as_tuple=True)
    return Tokens(
        rows=rows,
        columns=columns,
        token_ids=batch["input_ids"][there],
        targets=batch["targets"][rows],
        spans={},
        agreement=batch["agreement"][rows] if "agreement" in batch else None,
    )


def model_inputs(batch: Batch) -> Batch:
    """What a model's forward takes: no labels (losses are ours) and no bookkeeping columns."""
    unlike = (*_BOOKKEEPING, *(name for name in batch if is_layout(name) or name.startswith(_VIEW)))
    return {name: column for name, column in batch.items() if name not in unlike}


def view_column(teacher: str, column: str) -> str:
    """The batch's name of a column that a teacher with a view of its own has in place of the student's."""
    return f"{_VIEW}{teacher}.{column}"


def batch_of_view(batch: Batch, teacher: str) -> Batch:
    """The same rows as the teacher reads them: a batch of its own, with what the student's says of each row."""
    own = {name: batch[column] for name in _VIEWED if (column := view_column(teacher, name)) in batch}
    return {name: batch[name] for name in ("targets", "agreement") if name in batch} | own


def select_rows(batch: Batch, keep: Bool[Tensor, " B"]) -> Batch:
    """The rows of ``keep``, without the columns that are padding in all of them."""
    if bool(keep.all()):
        return batch
    part = {name: column[keep] for name, column in batch.items() if not is_layout(name)}
    labels = [name for name in part if name == "labels" or (name.startswith(_VIEW) and name.endswith(".labels"))]
    for name in labels:
        part = _trimmed(part, name.removesuffix("labels"))
    return _laid_out(part, packs=PACKED in batch) if len(part["labels"]) else part


def _trimmed(batch: Batch, whose: str) -> Batch:
    """Without padding columns among those whose names begin with ``whose``: the student's own, or those of a view."""
    inputs = (f"{whose}input_ids", f"{whose}attention_mask")
    labels = (f"{whose}labels", f"{whose}decoder_input_ids")
    if f"{whose}{_PIXELS}" in batch:
        return _trim(batch, labels, batch[labels[0]] != IGNORE_INDEX)
    mask = batch[inputs[1]].bool()
    if labels[1] not in batch:
        return _trim(batch, (*inputs, labels[0]), mask)
    return _trim(_trim(batch, labels, batch[labels[0]] != IGNORE_INDEX), inputs, mask)


def _laid_out(batch: Batch, *, packs: bool) -> Batch:
    """With a layout of its own, where the batch that it is a part of had one."""
    if not packs and INPUT not in batch:
        return batch
    device, lengths = batch["labels"].device, batch["attention_mask"].sum(1).tolist()
    if packs:
        columns = packed_layout(lengths)
    else:
        first: dict[int, int] = {}
        columns = parts_layout(
            [first.setdefault(number, row) for row, number in enumerate(batch.pop(INPUT).tolist())],
            lengths,
            _last(batch["labels"] != IGNORE_INDEX).tolist(),
            batch["targets"].tolist(),
            part_tokens=part_tokens_for(device.type),
        )
    return batch | {name: column.to(device) for name, column in columns.items()}


def _last(used: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """One more than the last used position of each row."""
    import torch

    return (used * torch.arange(1, used.size(1) + 1, device=used.device)).amax(1)


def _trim(batch: Batch, names: tuple[str, ...], used: Bool[Tensor, "B T"]) -> Batch:
    """Cuts the named columns behind the last used position (right padding)."""
    width = int(used.any(0).nonzero().max()) + 1 if bool(used.any()) else 1
    return {name: column[:, :width] if name in names else column for name, column in batch.items()}
