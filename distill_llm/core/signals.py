"""What one model says about the supervised tokens of a batch. The only place that shifts and masks.

B rows, T positions, N supervised tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

Batch = dict[str, Any]
"""Columns ``input_ids``, ``attention_mask``, ``labels`` [B, T] and ``targets`` [B] (index into TARGETS);
``decoder_input_ids`` [B, T] too where the model is an encoder-decoder."""

IGNORE_INDEX = -100
_BOOKKEEPING = ("labels", "targets")


@dataclass(frozen=True, slots=True)
class Signals:
    """One model's outputs at N supervised tokens, in row order."""

    logits: Float[Tensor, "N V"]
    token_ids: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]

    def where(self, keep: Bool[Tensor, " N"]) -> Signals:
        if bool(keep.all()):
            return self
        return Signals(self.logits[keep], self.token_ids[keep], self.targets[keep])


def aligned_labels(batch: Batch) -> Int[Tensor, "B T"]:
    """Labels as the logits see them: shifted by one for a decoder-only batch."""
    return batch["labels"] if "decoder_input_ids" in batch else batch["labels"][:, 1:]


def signals_of(logits: Float[Tensor, "B T V"], batch: Batch) -> Signals:
    """The supervised tokens of a forward pass."""
    labels = aligned_labels(batch)
    keep = labels != IGNORE_INDEX
    return Signals(
        logits=logits[:, : labels.size(1)][keep],
        token_ids=labels[keep],
        targets=batch["targets"][:, None].expand_as(labels)[keep],
    )


def model_inputs(batch: Batch) -> Batch:
    """What a model's forward takes: no labels (losses are ours) and no bookkeeping columns."""
    return {name: column for name, column in batch.items() if name not in _BOOKKEEPING}


def select_rows(batch: Batch, keep: Bool[Tensor, " B"]) -> Batch:
    """The rows of ``keep``, without the columns that are padding in all of them."""
    if bool(keep.all()):
        return batch
    part = {name: column[keep] for name, column in batch.items()}
    if "decoder_input_ids" in part:
        part = _trim(part, ("labels", "decoder_input_ids"), part["labels"] != IGNORE_INDEX)
        return _trim(part, ("input_ids", "attention_mask"), part["attention_mask"].bool())
    return _trim(part, ("input_ids", "attention_mask", "labels"), part["attention_mask"].bool())


def _trim(batch: Batch, names: tuple[str, ...], used: Bool[Tensor, "B T"]) -> Batch:
    """Cuts the named columns behind the last used position (right padding)."""
    width = int(used.any(0).nonzero().max()) + 1 if bool(used.any()) else 1
    return {name: column[:, :width] if name in names else column for name, column in batch.items()}
