"""The sampler: which rows a step sees, whatever the micro-batches, and again after a resume."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, islice, pairwise

import pytest

from distill_llm.core.errors import ConfigError
from distill_llm.data.rows import Row, RowView
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


def _by_tokens(limit: int, *, ranks: int = 1, max_steps: int = 15) -> tuple[StepSampler, list[list[list[int]]]]:
    sampler = StepSampler(
        ROWS, rows_per_step=8, rows_per_batch=3, max_steps=max_steps, seed=1, ranks=ranks, tokens_per_batch=limit
    )
    batches, share = list(sampler), sampler.micro_batches * ranks
    assert len(batches) == len(sampler) == max_steps * share
    return sampler, [batches[i : i + share] for i in range(0, len(batches), share)]


def _padded(batch: list[int]) -> int:
    rows = [ROWS[index] for index in batch]
    return len(rows) * (max(len(row.input_ids) for row in rows) + max(len(row.label_ids) for row in rows))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("limit", [17, 30, 60, 90, 1000])
def test_micro_batches_keep_to_a_limit_of_tokens(limit: int, ranks: int) -> None:
    """None is empty, none too large, each rank has as many as the others, and the rows are those of any other cut."""
    sampler, steps = _by_tokens(limit, ranks=ranks)
    assert [sorted(index for batch in step for index in batch) for step in steps] == [
        sorted(step[0]) for step in _steps()
    ]
    assert min(len(batch) for step in steps for batch in step) >= 1
    assert max(_padded(batch) for step in steps for batch in step) <= limit
    for step in steps:
        sizes = [len(batch) for batch in step]
        assert all(sizes[at] == sizes[at + rank] for at in range(0, len(sizes), ranks) for rank in range(ranks))
    if limit == 1000:
        assert sampler.micro_batches == 1


def test_there_are_no_more_micro_batches_than_some_step_needs() -> None:
    """Against all ways to cut a sorted step in fewer pieces, tried one by one."""
    sampler, steps = _by_tokens(60)
    rows = [[index for batch in step for index in batch] for step in steps]

    def can_be_cut(step: list[int], pieces: int) -> bool:
        for places in combinations(range(1, len(step)), pieces - 1):
            bounds = [0, *places, len(step)]
            if all(_padded(step[start:stop]) <= 60 for start, stop in pairwise(bounds)):
                return True
        return False

    assert sampler.micro_batches > 1
    assert all(can_be_cut(step, sampler.micro_batches) for step in rows)
    assert not all(can_be_cut(step, sampler.micro_batches - 1) for step in rows)


def test_a_row_that_is_larger_than_a_micro_batch_is_refused() -> None:
    longest = max(row.num_tokens for row in ROWS)
    _by_tokens(longest)
    with pytest.raises(ConfigError, match=rf"train\.tokens_per_batch: a row has {longest} tokens"):
        _by_tokens(longest - 1)


def test_tokens_seen_do_not_depend_on_the_cut() -> None:
    whole = StepSampler(ROWS, rows_per_step=8, rows_per_batch=8, max_steps=15, seed=1)
    assert _by_tokens(40)[0].tokens_until(7) == whole.tokens_until(7)
    assert whole.tokens_until(5) == sum(row.num_tokens for row in ROWS), "five steps are an epoch"


def _pairs(index: int) -> tuple[int, tuple[int, ...]]:
    return ROWS[index].example, tuple(ROWS[index].input_ids)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("rows_per_batch", [2, 4])
def test_rows_of_one_input_stay_together_where_it_is_read_once(rows_per_batch: int, ranks: int) -> None:
    options = {"rows_per_step": 8, "rows_per_batch": rows_per_batch, "max_steps": 15, "seed": 1, "ranks": ranks}
    batches = list(StepSampler(ROWS, share_inputs=True, **options))
    for batch in batches:
        assert len(batch) == rows_per_batch
        assert set(Counter(map(_pairs, batch)).values()) == {2}
    share = 8 // rows_per_batch
    together = [
        sorted(index for batch in batches[at : at + share] for index in batch) for at in range(0, len(batches), share)
    ]
    assert together == [sorted(step[0]) for step in _steps()], "the step has the rows that it would have otherwise"
    longest = [max(len(ROWS[index].label_ids) for index in batch) for batch in batches[:share]]
    assert ranks > 1 or longest == sorted(longest)


@pytest.mark.parametrize("rows_per_batch", [1, 3])
def test_runs_that_do_not_fit_are_cut(rows_per_batch: int) -> None:
    batches = list(
        StepSampler(ROWS, rows_per_step=12, rows_per_batch=rows_per_batch, max_steps=10, seed=1, share_inputs=True)
    )
    assert {len(batch) for batch in batches} == {rows_per_batch}
    assert Counter(index for batch in batches for index in batch) == dict.fromkeys(range(40), 3)


def _shared_tokens(batch: list[int]) -> int:
    """Each input once, and labels not padded to rationales."""
    rows = [ROWS[index] for index in batch]
    tokens = len(set(map(_pairs, batch))) * max(len(row.input_ids) for row in rows)
    for target in ("label", "rationale"):
        own = [len(row.label_ids) for row in rows if row.target == target]
        tokens += len(own) * max(own, default=0)
    return tokens


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("limit", [17, 30, 60, 1000])
def test_a_shared_input_counts_once_in_the_limit_of_tokens(limit: int, ranks: int) -> None:
    options = {"rows_per_step": 8, "rows_per_batch": 3, "max_steps": 15, "seed": 1, "ranks": ranks}
    sampler = StepSampler(ROWS, tokens_per_batch=limit, share_inputs=True, **options)
    batches, share = list(sampler), sampler.micro_batches * ranks
    assert len(batches) == len(sampler) == 15 * share
    assert all(0 < _shared_tokens(batch) <= limit for batch in batches)
    steps = [
        sorted(index for batch in batches[at : at + share] for index in batch) for at in range(0, len(batches), share)
    ]
    assert steps == [sorted(step[0]) for step in _steps()]
    if limit == 60:
        assert sampler.micro_batches < _by_tokens(limit, ranks=ranks)[0].micro_batches


def test_a_teachers_view_keeps_to_the_limit_of_tokens_too() -> None:
    """Its prompt may be far longer than the student's input: of 40 tokens a row, 3 fit into 120."""
    view = RowView([1] * 35, [1] * 5, range(5))
    rows = [Row(n, "label", [1] * 4, [1] * 2, views={"big": view} if n % 2 else {}) for n in range(24)]
    options = {"rows_per_step": 24, "rows_per_batch": 24, "max_steps": 2, "seed": 1, "tokens_per_batch": 120}
    batches = list(StepSampler(rows, **options))
    assert max(sum(40 for index in batch if rows[index].views) for batch in batches) == 120
    assert sorted(index for batch in batches[: len(batches) // 2] for index in batch) == list(range(24))
    plain = list(StepSampler([Row(n, "label", [1] * 4, [1] * 2) for n in range(24)], **options))
    assert len(plain) < len(batches), "the student's own tokens would have gone into fewer"
    with pytest.raises(ConfigError, match=r"a row has 40 tokens as teachers\.big reads it .*more than 39"):
        StepSampler(rows, **(options | {"tokens_per_batch": 39}))
