"""Columns of captured log-probabilities: the rest is what is left of 1, and what is not known says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distill_llm.cache.captured import SMALLEST_REST, captured_columns
from distill_llm.cache.payload import Kept
from distill_llm.cache.top_k import TopK
from distill_llm.core.signals import Signals
from distill_llm.core.sparse import TopSignals
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.objective import Term

WIDTH = 9
WORDS = np.array([[5, 2], [0, 8], [7, 1]])
PROBS = np.array([[0.5, 0.25], [0.9, 0.1], [0.3, 0.05]])


def _signals(places: list[int], words: Any = WORDS, probs: Any = PROBS) -> TopSignals:
    with np.errstate(divide="ignore"):
        columns = captured_columns(words, np.log(probs), places, width=WIDTH)
    none = torch.zeros(len(places), dtype=torch.long)
    about = Signals(torch.zeros(len(places), 0), none, none)
    found = TopK(k=words.shape[1]).decode(Kept(columns, about, WIDTH))
    assert isinstance(found, TopSignals)
    return found


def test_nothing_is_renormalised_and_the_rest_is_one_word() -> None:
    said = _signals([2, 0])
    assert said.word_ids.tolist() == [[7, 1], [5, 2]]
    expected = torch.tensor([[0.3, 0.05, 0.65], [0.5, 0.25, 0.25]])
    torch.testing.assert_close(said.log_coarse(1.0).exp(), expected, atol=1e-3, rtol=1e-3)
    assert said.known is not None
    assert said.known.all()


def test_a_rest_below_what_six_decimals_tell_is_not_zero() -> None:
    assert _signals([1]).log_coarse(1.0)[0, -1].exp() == pytest.approx(SMALLEST_REST, rel=1e-2)


def test_all_words_leave_no_rest() -> None:
    words, probs = np.arange(WIDTH)[None], np.full((1, WIDTH), 1 / WIDTH)
    assert _signals([0], words, probs).log_coarse(1.0)[0, -1] == -torch.inf


@pytest.mark.parametrize(
    ("word", "prob"),
    [(WIDTH, 0.25), (-1, 0.25), (2, np.nan)],
    ids=["beyond the tokenizer", "no word", "fewer than k were told"],
)
def test_what_cannot_be_compared_is_not_known(word: int, prob: float) -> None:
    words, probs = WORDS.copy(), PROBS.copy()
    words[0, 1], probs[0, 1] = word, prob
    said = _signals([0, -1, 2], words, probs)
    assert said.known is not None
    assert said.known.tolist() == [False, False, True]
    assert bool((said.word_ids < WIDTH).all() and (said.word_ids >= 0).all())


def test_tokens_that_are_not_known_add_nothing_and_get_no_gradient() -> None:
    said = _signals([0, -1, 2])
    logits = torch.randn(3, WIDTH, requires_grad=True)
    term = Term(name="soft", loss=ForwardKL(), targets=("rationale",), teacher="heard")
    student = Signals(logits, said.token_ids, said.targets)
    losses = term.of_each(student, said)
    assert losses[1] == 0
    assert bool((losses[[0, 2]] > 0).all())
    losses.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum(-1).gt(0).tolist() == [True, False, True]
    assert said.part(1, 3).known.tolist() == said.where(torch.tensor([False, True, True])).known.tolist()  # type: ignore[union-attr]
