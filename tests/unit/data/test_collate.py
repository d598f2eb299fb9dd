"""The collator: what is padded with what, and where labels stand."""

from __future__ import annotations

import pytest
import torch

from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row

ROWS = [Row(0, "rationale_then_label", [5, 6, 7], [8, 1], agreement=0.75), Row(1, "label", [9], [10, 11, 1])]


def test_encoder_decoder() -> None:
    """Labels padded with -100, decoder inputs shifted by the start token and padded with the padding token."""
    batch = Collator(0, 2)(ROWS)
    assert {name: column.tolist() for name, column in batch.items()} == {
        "input_ids": [[5, 6, 7], [9, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "decoder_input_ids": [[2, 8, 0], [2, 10, 11]],
        "labels": [[8, 1, -100], [10, 11, 1]],
        "targets": [2, 0],
        "agreement": [0.75, 1.0],
        "keys": [861055911292001067, 2776375932385380135],
    }


def test_decoder_only() -> None:
    """The prompt and the label in one sequence, padded on the right; the prompt is not learned."""
    batch = Collator(0, None)(ROWS)
    assert {name: column.tolist() for name, column in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 1], [9, 10, 11, 1, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],
        "labels": [[-100, -100, -100, 8, 1], [-100, 10, 11, 1, -100]],
        "targets": [2, 0],
        "agreement": [0.75, 1.0],
        "keys": [861055911292001067, 2776375932385380135],
    }


@pytest.mark.parametrize("start", [0, None])
def test_a_padding_token_that_is_a_real_token_is_still_learned(start: int | None) -> None:
    """GPT-2 and others pad with their end of sequence: masks go by place, not by token."""
    batch = Collator(1, start)([Row(0, "label", [1, 5], [6, 1]), Row(1, "label", [4, 4, 4], [6, 6, 1])])
    assert batch["attention_mask"][0, :2].tolist() == [1, 1]
    assert (batch["labels"] != -100).sum(1).tolist() == [2, 3]
    assert batch["labels"].dtype == torch.int64


def test_keys_are_those_of_what_a_row_says_and_of_nothing_else() -> None:
    """A cache on disk is found by them: the numbers above must never change."""
    row = Row(0, "label", [5, 6], [7, 1], agreement=0.5)
    assert row.key == Row(3, "label", (5, 6), (7, 1)).key
    others = [
        Row(0, "rationale", [5, 6], [7, 1]),
        Row(0, "label", [5, 6], [8, 1]),
        Row(0, "label", [6, 5], [7, 1]),
        Row(0, "label", [5], [6, 7, 1]),
        Row(0, "label", [5, 6, 7], [1]),
    ]
    assert len({one.key for one in (row, *others)}) == 6
    assert all(0 <= one.key < 2**63 for one in others)
