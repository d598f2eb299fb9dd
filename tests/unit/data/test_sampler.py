"""The sampler: which rows a step sees, whatever the micro-batches, and again after a resume."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from distill_llm.data.rows import Row
from distill_llm.data.sampler import StepSampler

ROWS = [
    row
    for example in range(20)
    for row in (
        Row(example, "label", [1] * (3 + example % 5), [1] * (1 + example % 2)),
        Row(example, "rationale", [1] * (3 + example % 5), [1] * (4 + example % 7)),
    )
]


def _steps(*, rows_per_batch: int = 8, max_steps: int = 15, seed: int = 1) -> list[list[list[int]]]:
    sampler = StepSampler(ROWS, rows_per_step=8, rows_per_batch=rows_per_batch, max_steps=max_steps, seed=seed)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    share = 8 // rows_per_batch
    return [batches[i : i + share] for i in range(0, len(batches), share)]


@pytest.mark.parametrize("rows_per_batch", [1, 2, 4])
def test_a_step_has_the_same_rows_for_any_micro_batch(rows_per_batch: int) -> None:
    whole = [sorted(step[0]) for step in _steps()]
    cut = [sorted(index for batch in step for index in batch) for step in _steps(rows_per_batch=rows_per_batch)]
    assert cut == whole
    assert all(len(batch) == rows_per_batch for step in _steps(rows_per_batch=rows_per_batch) for batch in step)


def test_each_epoch_sees_each_row_once() -> None:
    """40 rows in steps of 8: five steps are an epoch."""
    seen = [index for step in _steps() for batch in step for index in batch]
    for start in (0, 40, 80):
        assert sorted(seen[start : start + 40]) == list(range(40))
    assert seen[:40] != seen[40:80], "each epoch has its own order"


def test_epochs_follow_each_other_without_a_gap() -> None:
    """12 rows a step do not divide 40: step 4 ends one epoch and begins the next, and no row is left out."""
    batches = list(StepSampler(ROWS, rows_per_step=12, rows_per_batch=12, max_steps=10, seed=1))
    assert Counter(index for batch in batches for index in batch) == dict.fromkeys(range(40), 3)


def test_rows_of_one_example_come_in_one_step() -> None:
    for step in _steps():
        examples = Counter(ROWS[index].example for batch in step for index in batch)
        assert set(examples.values()) == {2}


def test_the_seed_and_nothing_else_decides() -> None:
    assert _steps(seed=1) == _steps(seed=1)
    assert _steps(seed=1) != _steps(seed=2)
    sampler = StepSampler(ROWS, rows_per_step=8, rows_per_batch=4, max_steps=3, seed=1)
    assert list(sampler) == list(sampler), "iterating leaves no trace"


def test_skipping_batches_is_resuming() -> None:
    """More steps go on where fewer ended; Trainer skips what a checkpoint has done."""
    short, long = _steps(max_steps=7), _steps(max_steps=15)
    assert long[:7] == short
    sampler = StepSampler(ROWS, rows_per_step=8, rows_per_batch=2, max_steps=15, seed=1)
    rest = list(islice(sampler, 7 * 4, None))
    assert [rest[i : i + 4] for i in range(0, len(rest), 4)] == _steps(rows_per_batch=2)[7:]


def test_micro_batches_have_rows_of_one_target_and_about_one_length() -> None:
    for step in _steps(rows_per_batch=2):
        sizes = [(ROWS[i].target, len(ROWS[i].label_ids), len(ROWS[i].input_ids)) for batch in step for i in batch]
        assert sizes == sorted(sizes)
        assert all(ROWS[first].target == ROWS[second].target for first, second in step)
