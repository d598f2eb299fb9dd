"""From rows to one flat, padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill_llm.core.example import TARGETS
from distill_llm.core.layout import packed_layout, parts_layout
from distill_llm.core.signals import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.data.rows import Row


@dataclass(frozen=True, slots=True)
class Collator:
    """``decoder_start_token_id`` is None for a decoder-only student.

    ``part_tokens``: an encoder-decoder's rows go through it in parts of so many tokens, each distinct input once; 0:
    all rows side by side. ``packs``: a decoder-only student's rows go through it as one.
    """

    pad_token_id: int
    decoder_start_token_id: int | None
    part_tokens: int = 0
    packs: bool = False

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
            layout = packed_layout([len(ids) for ids in inputs]) if self.packs else {}
            return self._padded_inputs(inputs) | {"labels": _padded(labels, IGNORE_INDEX)} | about | layout
        labels = [[IGNORE_INDEX] * len(row.prefix_ids) + list(row.label_ids) for row in rows]
        shifted = [[self.decoder_start_token_id, *row.prefix_ids, *row.label_ids[:-1]] for row in rows]
        return self._padded_inputs([row.input_ids for row in rows]) | {
            "decoder_input_ids": _padded(shifted, self.pad_token_id),
            "labels": _padded(labels, IGNORE_INDEX),
            **about,
            **self._layout(rows),
        }

    def _layout(self, rows: Sequence[Row]) -> Batch:
        if not self.part_tokens:
            return {}
        first: dict[tuple[int, ...], int] = {}
        return parts_layout(
            [first.setdefault(tuple(row.input_ids), number) for number, row in enumerate(rows)],
            [len(row.input_ids) for row in rows],
            [row.num_target_tokens for row in rows],
            [TARGETS.index(row.target) for row in rows],
            part_tokens=self.part_tokens,
        )

    def _padded_inputs(self, inputs: Sequence[Sequence[int]]) -> Batch:
        return {
            "input_ids": _padded(inputs, self.pad_token_id),
            "attention_mask": _padded([[1] * len(ids) for ids in inputs], 0),
        }


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    import torch

    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
