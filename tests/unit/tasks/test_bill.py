"""The generated task with five classes."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import pytest
from pydantic import ValidationError

from distill_llm.tasks.bill import Bill

SMALL = {"products": 40, "train_size": 300, "validation_size": 50, "test_size": 100}
ORDER = ["cheap", "low", "fair", "high", "dear"]


def test_labels_are_those_of_the_sums_that_rationales_state() -> None:
    splits = Bill.model_validate(SMALL).load(0)
    sums: dict[str, list[int]] = {}
    for example in (*splits.train, *splits.validation, *splits.test):
        first, second, total = map(int, re.fullmatch(r"(\d+) \+ (\d+) = (\d+) \.", example.rationale or "").groups())  # type: ignore[union-attr]  # fmt: skip
        assert first + second == total
        sums.setdefault(example.label or "", []).append(total)
    assert sorted(sums) == sorted(ORDER)
    for lower, higher in pairwise(ORDER):
        assert max(sums[lower]) < min(sums[higher])
    shares = Counter(example.label for example in splits.train)
    assert all(0.1 < shares[label] / 300 < 0.32 for label in ORDER), "each has about a fifth of the pairs"


def test_a_seed_fixes_prices_and_another_stream_draws_other_questions() -> None:
    first, again = Bill.model_validate(SMALL).load(0), Bill.model_validate(SMALL).load(1)
    assert first == again
    other = Bill.model_validate(SMALL | {"train_stream": 1}).load(0)
    assert other.test == first.test
    assert {e.input for e in other.train} != {e.input for e in first.train}
    pool = Bill.model_validate(SMALL | {"labelled": False}).load(0)
    assert {(e.label, e.rationale) for e in pool.train} == {(None, None)}
    assert pool.train[0].choices == tuple(ORDER)


def test_too_few_products_are_refused() -> None:
    with pytest.raises(ValidationError, match="10 products make 90 questions, too few"):
        Bill(products=10)
