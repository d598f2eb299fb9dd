"""Signals: which logits stand for which tokens in both families, and what is left when rows are selected."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from distill_llm.core.signals import (
    IGNORE_INDEX,
    Signals,
    batch_of_view,
    model_inputs,
    select_rows,
    signals_of,
    view_column,
)
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill_llm.models.load import LoadedModel

ROWS = [
    Row(0, "label", [5, 6, 7], [8, 1]),
    Row(0, "rationale", [5], [9, 10, 11, 1]),
    Row(1, "label", [5, 6, 7, 8, 9, 10, 11, 12], [1]),
]
TARGETS = [0, 0, 1, 1, 1, 1, 0]
TOKENS = [8, 1, 9, 10, 11, 1, 1]


def _positions(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of which each row of the vocabulary says (row, position)."""
    rows, width = batch["decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"].shape
    where = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(width), indexing="ij"), -1)
    return where.float()


def test_encoder_decoder_logits_stand_at_their_own_labels() -> None:
    batch = Collator(0, 2)(ROWS)
    got = signals_of(_positions(batch), batch)
    assert got.token_ids.tolist() == TOKENS
    assert got.targets.tolist() == TARGETS
    assert got.logits.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [1, 3], [2, 0]]


def test_decoder_only_logits_stand_one_before_their_labels() -> None:
    """The last prompt token predicts the first label token; nothing predicts the prompt."""
    batch = Collator(0, None)(ROWS)
    got = signals_of(_positions(batch), batch)
    assert got.token_ids.tolist() == TOKENS
    assert got.targets.tolist() == TARGETS
    assert got.logits.tolist() == [[0, 2], [0, 3], [1, 0], [1, 1], [1, 2], [1, 3], [2, 7]]


def test_where_keeps_order_and_all_three_columns() -> None:
    logits = torch.arange(8.0).view(4, 2)
    ids, targets = torch.tensor([3, 4, 5, 6]), torch.tensor([0, 1, 0, 1])
    part = Signals(logits, ids, targets).where(targets == 1)
    assert part.logits.tolist() == [[2, 3], [6, 7]]
    assert part.token_ids.tolist() == [4, 6]
    assert part.targets.tolist() == [1, 1]


def test_what_is_not_known_stays_with_its_token() -> None:
    ids, targets = torch.tensor([3, 4, 5, 6]), torch.tensor([0, 1, 0, 1])
    known = torch.tensor([True, False, False, True])
    signals = Signals(torch.arange(8.0).view(4, 2), ids, targets, torch.rand(4), known=known)
    assert signals.where(targets == 1).known.tolist() == [False, True]  # type: ignore[union-attr]
    assert signals.part(1, 3).known.tolist() == [False, False]  # type: ignore[union-attr]
    assert signals.narrowed(1).known is known
    assert Signals(signals.logits, ids, targets).part(0, 2).known is None


def test_columns_of_a_teacher_are_found_by_its_whole_name() -> None:
    """`a` and `a.b` are two teachers; neither reads the other's, and no model reads either's as its own."""
    batch = Collator(0, 2)(ROWS)
    for number, teacher in enumerate(("a", "a.b")):
        batch |= {view_column(teacher, name): batch["input_ids"] + number for name in ("input_ids", "labels")}
    for number, teacher in enumerate(("a", "a.b")):
        own = batch_of_view(batch, teacher)
        assert set(own) == {"targets", "agreement", "input_ids", "labels"}
        assert torch.equal(own["input_ids"], batch["input_ids"] + number)
    assert set(model_inputs(batch)) == {"input_ids", "attention_mask", "decoder_input_ids"}


def test_a_model_is_given_no_labels() -> None:
    batch = Collator(0, 2)(ROWS)
    assert set(model_inputs(batch)) == {"input_ids", "attention_mask", "decoder_input_ids"}


@pytest.mark.parametrize("start", [2, None])
@pytest.mark.parametrize("keep", [[True, False, False], [False, True, False], [True, True, False]])
def test_selected_rows_are_as_if_collated_alone(start: int | None, keep: list[bool]) -> None:
    """Trimmed to the longest that is left, in inputs and labels apart for an encoder-decoder."""
    collate = Collator(0, start)
    got = select_rows(collate(ROWS), torch.tensor(keep))
    expected = collate([row for row, kept in zip(ROWS, keep, strict=True) if kept])
    assert got.keys() == expected.keys()
    for name, column in expected.items():
        assert got[name].tolist() == column.tolist(), name


def test_selecting_all_rows_is_the_batch_itself() -> None:
    batch = Collator(0, 2)(ROWS)
    assert select_rows(batch, torch.tensor([True, True, True])) is batch


@pytest.mark.parametrize("start", [2, None])
def test_selecting_no_row_leaves_no_token(start: int | None) -> None:
    part = select_rows(Collator(0, start)(ROWS), torch.tensor([False] * 3))
    assert part["labels"].numel() == 0
    assert (part["labels"] != IGNORE_INDEX).sum() == 0


def test_a_models_signals_do_not_depend_on_the_other_rows(tiny_model: Callable[..., LoadedModel]) -> None:
    """Row by row or padded together: the same logits, so that a teacher may be asked about some rows only."""
    model = tiny_model()
    start = model.model.config.decoder_start_token_id if model.is_encoder_decoder else None
    collate = Collator(model.tokenizer.pad_token_id, start)
    together = collate(ROWS)
    logits = signals_of(model.model(**model_inputs(together)).logits, together).logits
    alone = [collate([row]) for row in ROWS]
    expected = [signals_of(model.model(**model_inputs(batch)).logits, batch).logits for batch in alone]
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-5, rtol=1e-5)
