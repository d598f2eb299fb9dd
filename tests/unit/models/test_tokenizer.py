"""Tokenizers that are trained on the spot."""

from __future__ import annotations

import pytest

from distill_llm.models.spec import FreshTokenizer
from distill_llm.models.tokenizer import train_tokenizer

TEXT = "predict: where do you borrow books?\n(a) library\n(b) bus stop"


@pytest.mark.parametrize("kind", ["words", "bytes_bpe"])
def test_a_word_alone_has_the_token_that_it_has_inside_a_text(kind: str) -> None:
    """A student from random weights answers by copying a choice: it cannot where the choice has other tokens."""
    tokenizer = train_tokenizer(FreshTokenizer.model_validate({"kind": kind, "vocab_size": 400}), [TEXT] * 4)
    (token,) = tokenizer("library")["input_ids"]
    assert token in tokenizer(TEXT)["input_ids"]


@pytest.mark.parametrize("text", ["library", "( 84.0 / 2.0 )", "two\nlines", "Größe 3,5 €"])
def test_bytes_give_back_any_text(text: str) -> None:
    """But for the space in front, which every reader strips."""
    tokenizer = train_tokenizer(FreshTokenizer(kind="bytes_bpe", vocab_size=400), [TEXT])
    assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text
