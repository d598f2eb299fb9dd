"""From rows to one flat, padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill_llm.core.example import TARGETS
from distill_llm.core.signals import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.data.rows import Row


@dataclass(frozen=True, slots=True)
class Collator:
    """``decoder_start_token_id`` is None for a decoder-only student."""

    pad_token_id: int
    decoder_start_token_id: int | None

    def __call__(self, rows: Sequence[Row]) -> Batch:
        import torch

        about = {
            "targets": torch.tensor([TARGETS.index(row.target) for row in rows]),
            "agreement": torch.tensor([row.agreement for row in rows]),
            "keys": torch.tensor([row.key for row in rows]),
        }
        if self.decoder_start_token_id is None:
            inputs = [[*row.input_ids, *row.label_ids] for row in rows]
            labels = [[IGNORE_INDEX] * len(row.input_ids) + list(row.label_ids) for row in rows]
            return self._padded_inputs(inputs) | {"labels": _padded(labels, IGNORE_INDEX)} | about
        labels = [row.label_ids for row in rows]
        shifted = [[self.decoder_start_token_id, *ids[:-1]] for ids in labels]
        return self._padded_inputs([row.input_ids for row in rows]) | {
            "decoder_input_ids": _padded(shifted, self.pad_token_id),
            "labels": _padded(labels, IGNORE_INDEX),
            **about,
        }

    def _padded_inputs(self, inputs: Sequence[Sequence[int]]) -> Batch:
        return {
            "input_ids": _padded(inputs, self.pad_token_id),
            "attention_mask": _padded([[1] * len(ids) for ids in inputs], 0),
        }


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    import torch

    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
