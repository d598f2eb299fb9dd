"""From rows to one flat, padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from distill_llm.core.example import TARGETS
from distill_llm.core.layout import INPUT, is_layout, packed_layout, parts_layout
from distill_llm.core.signals import IGNORE_INDEX, OWN, Batch, batch_of_view, view_column

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.data.rows import Row, RowView
    from distill_llm.models.picture import Painter


@dataclass(frozen=True, slots=True)
class Collator:
    """``decoder_start_token_id`` is None for a decoder-only model. ``views``: teachers with a view of their own.

    ``part_tokens``: an encoder-decoder's rows go through it in parts of so many tokens, each distinct input once; 0:
    all rows side by side. ``packs``: a decoder-only student's rows go through it as one. ``keyed``: with the column
    ``keys``, which costs a hash of each row. ``painter``: of a model that reads pictures.
    """

    pad_token_id: int
    decoder_start_token_id: int | None
    part_tokens: int = 0
    packs: bool = False
    keyed: bool = True
    views: Mapping[str, Collator] = field(default_factory=dict)
    painter: Painter | None = None

    def __call__(self, rows: Sequence[Row]) -> Batch:
        import torch

        about = {
            "targets": torch.tensor([TARGETS.index(row.target) for row in rows]),
            "agreement": torch.tensor([row.agreement for row in rows]),
        }
        if self.keyed:
            about["keys"] = torch.tensor([row.key for row in rows])
        batch = self._columns(rows) | about | self._layout(rows)
        for teacher, collator in self.views.items():
            own = collator._viewed([row.views.get(teacher) for row in rows], [len(row.label_ids) for row in rows])
            batch |= {view_column(teacher, name): column for name, column in own.items()}
        return batch

    def rows_of(self, batch: Batch) -> list[Row]:
        """The rows of text that ``batch`` was made of, but for their examples, which it does not know: 0.

        A teacher that has nothing to say of a row has a view of it all the same, of which no place is a counterpart.
        """
        from distill_llm.data.rows import Row, RowView

        views: dict[str, list[RowView]] = {}
        for name, collator in self.views.items():
            own = batch_of_view(batch, name)
            read = zip(collator._texts(own), own["places"].tolist(), batch["labels"].tolist(), strict=True)
            views[name] = [
                RowView(inputs, labels, places[: sum(label != IGNORE_INDEX for label in of_row)], prefix)
                for (inputs, prefix, labels), places, of_row in read
            ]
        about = zip(self._texts(batch), batch["targets"].tolist(), batch["agreement"].tolist(), strict=True)
        return [
            Row(0, TARGETS[target % OWN], inputs, labels, agreement, prefix, {name: views[name][row] for name in views})
            for row, ((inputs, prefix, labels), target, agreement) in enumerate(about)
        ]

    def rewritten(self, batch: Batch, texts: Mapping[int, Sequence[int]]) -> Batch:
        """``batch`` with other target tokens in some rows, by their place, which are marked as the student's own.

        A row keeps its key, and what else is known of it. A teacher with a view reads the new target behind the prompt
        that it had, so its tokens must be the student's. Laid out as this collator does.
        """
        import torch

        rows = [
            _with_target(row, texts[place]) if place in texts else row for place, row in enumerate(self.rows_of(batch))
        ]
        home = batch["labels"].device
        made = {name: column.to(home) for name, column in self(rows).items()}
        own = torch.tensor([place in texts for place in range(len(rows))], device=home)
        made["targets"] = batch["targets"] + OWN * (own & (batch["targets"] < OWN))
        kept = {name: column for name, column in batch.items() if not is_layout(name)}
        return {name: column for name, column in kept.items() if name != INPUT} | made | {"keys": batch["keys"]}

    def _texts(self, batch: Batch) -> list[tuple[list[int], tuple[int, ...], list[int]]]:
        """Of each row the ids that were put in: the input's, those of the decoder's prefix, and the target's."""
        found = []
        for row, (ids, mask, labels) in enumerate(
            zip(*(batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")), strict=True)
        ):
            inputs, target = ids[: sum(mask)], [token for token in labels if token != IGNORE_INDEX]
            if self.decoder_start_token_id is None:
                found.append((inputs[: len(inputs) - len(target)], (), target))
            else:
                first = next(place for place, token in enumerate(labels) if token != IGNORE_INDEX)
                found.append((inputs, tuple(batch["decoder_input_ids"][row, 1 : first + 1].tolist()), target))
        return found

    def _columns(self, rows: Sequence[Row] | Sequence[RowView]) -> Batch:
        if self.decoder_start_token_id is None:
            inputs = [[*row.input_ids, *row.label_ids] for row in rows]
            labels = [[IGNORE_INDEX] * len(row.input_ids) + list(row.label_ids) for row in rows]
            return self._padded_inputs(inputs) | {"labels": _padded(labels, IGNORE_INDEX)} | self._pixels(rows)
        labels = [[IGNORE_INDEX] * len(row.prefix_ids) + list(row.label_ids) for row in rows]
        shifted = [[self.decoder_start_token_id, *row.prefix_ids, *row.label_ids[:-1]] for row in rows]
        return self._inputs(rows) | {
            "decoder_input_ids": _padded(shifted, self.pad_token_id),
            "labels": _padded(labels, IGNORE_INDEX),
        }

    def _layout(self, rows: Sequence[Row]) -> Batch:
        if self.decoder_start_token_id is None:
            return packed_layout([len(row.input_ids) + len(row.label_ids) for row in rows]) if self.packs else {}
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

    def _viewed(self, views: Sequence[RowView | None], num_labels: Sequence[int]) -> Batch:
        """A row of which the teacher knows nothing has one token, which is nobody's counterpart: no tensor is empty."""
        from distill_llm.data.rows import RowView

        nothing = [self.pad_token_id]
        read = (self.painter.places if self.painter is not None else []) or nothing
        filled = [
            view if view is not None else RowView(read, nothing, [-1] * count)
            for view, count in zip(views, num_labels, strict=True)
        ]
        return self._columns(filled) | {"places": _padded([view.places for view in filled], -1)}

    def _inputs(self, rows: Sequence[Row] | Sequence[RowView]) -> Batch:
        return self._pixels(rows) or self._padded_inputs([row.input_ids for row in rows])

    def _pixels(self, rows: Sequence[Row] | Sequence[RowView]) -> Batch:
        """Nothing for a model that reads text alone."""
        if self.painter is None:
            return {}
        blank = self.painter.picture("")
        return {"pixel_values": self.painter.pixels([row.picture or blank for row in rows])}

    def _padded_inputs(self, inputs: Sequence[Sequence[int]]) -> Batch:
        return {
            "input_ids": _padded(inputs, self.pad_token_id),
            "attention_mask": _padded([[1] * len(ids) for ids in inputs], 0),
        }


def _with_target(row: Row, label_ids: Sequence[int]) -> Row:
    """With another target, behind the same inputs; who had nothing to say of the row has nothing to say now."""
    views = {}
    for name, view in row.views.items():
        if max(view.places, default=-1) < 0:
            views[name] = replace(view, places=[-1] * len(label_ids))
        else:
            views[name] = replace(view, label_ids=label_ids, places=range(len(label_ids)))
    return replace(row, label_ids=label_ids, views=views)


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    import torch

    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
