"""Several processes ask side by side: each its share, into its own journal, within one budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from distill_llm.core.errors import StorageError
from distill_llm.core.files import read_json
from distill_llm.core.journal import keys_of
from distill_llm.core.progress import SILENT
from distill_llm.pipeline.asking import Asking
from distill_llm.pipeline.rationale_stage import check, make_asker, wanted_splits
from distill_llm.pipeline.run import generate_rationales, report_spent
from distill_llm.pipeline.run_folder import RunFolder, claim
from distill_llm.rationales.dataset import read_rows
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.base import Request

HINTS = "rationales.hint_retry={}"


def _no_to_all(request: Request) -> str:
    return f"Thought . The answer is {'yes' if request.hinted else 'no'}."


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Within ``with process(1, of=2):`` this is that process of so many, as torchrun tells it."""

    @contextmanager
    def be(rank: int, *, of: int) -> Iterator[None]:
        with monkeypatch.context() as patched:
            patched.setenv("RANK", str(rank))
            patched.setenv("WORLD_SIZE", str(of))
            yield

    return be


def _open(recipe: Recipe) -> Asking:
    spec = recipe.rationales
    assert spec is not None
    return Asking(make_asker(recipe, spec), claim(recipe), SILENT)


def _complete(asking: Asking, recipe: Recipe) -> None:
    for split, examples in wanted_splits(recipe, check(recipe)).items():
        asking.complete(split, examples)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_make_the_data_set_of_one(teach: Any, even: Any, process: Any, processes: int) -> None:
    alone = teach(_no_to_all)
    whole = generate_rationales(even(HINTS, run="whole"))
    shared = teach(_no_to_all)
    recipe = even(HINTS, run="shared")
    for rank in range(processes):
        with process(rank, of=processes), _open(recipe) as asking:
            before = len(shared.asked)
            _complete(asking, recipe)
            asked = shared.asked[before:]
            assert {request.example.id for request in asked if request.split == "train"} == {
                f"train-{n}" for n in range(rank, 12, processes)
            }
    assert sorted(shared.keys) == sorted(alone.keys)
    run = generate_rationales(recipe)
    assert len(shared.asked) == len(alone.asked), "the main process has only to write"
    assert len(run.journals()) == len(run.ledgers()) == processes
    for split in ("train", "test"):
        assert list(read_rows(run.rationales(split))) == list(read_rows(whole.rationales(split)))
    totals = [read_json(folder.spent)["total"] for folder in (run, whole)]
    names = ("requests", "completions", "tokens_in", "tokens_out")
    assert [totals[0][name] for name in names] == [totals[1][name] for name in names]


def test_another_number_of_processes_finds_what_is_there(teach: Any, even: Any, process: Any) -> None:
    recipe = even("evaluate.teacher=false")
    first = teach(_no_to_all)
    for rank in (0, 2):  # the second of three was killed before it began
        with process(rank, of=3), _open(recipe) as asking:
            asking.begin()
            _complete(asking, recipe)
    second = teach(_no_to_all)
    for rank in (0, 1):
        with process(rank, of=2), _open(recipe) as asking:
            asking.begin()
            assert asking.count(wanted_splits(recipe, check(recipe))) == (12, 8 + rank * 2)
            _complete(asking, recipe)
    assert (len(first.asked), len(second.asked), set(first.keys) & set(second.keys)) == (8, 4, set())
    assert len(keys_of(RunFolder(recipe.folder).journals())) == 12
    spent = report_spent(recipe)
    assert (spent["total"]["requests"], spent["latest"]["requests"]) == (12, 4), "the third is no process of the second"


def test_two_commands_cannot_ask_for_one_folder(teach: Any, even: Any, process: Any) -> None:
    teach()
    recipe = even()
    with _open(recipe):
        with pytest.raises(StorageError, match=r"journal\.jsonl: another process is writing to it"):
            generate_rationales(recipe)
        with process(1, of=2), _open(recipe) as other:
            assert other.journal.path.name == "journal.1.jsonl"


@pytest.mark.parametrize("processes", [2, 3])
def test_one_budget_for_all_processes_and_all_rounds(teach: Any, even: Any, process: Any, processes: int) -> None:
    """A fast process is through with train, hints and test before a slow one has begun."""
    recipe = even(HINTS, "rationales.budget.max_requests=9")
    teacher = teach(_no_to_all)
    opened = []
    for rank in range(processes):
        with process(rank, of=processes):
            opened.append(_open(recipe))
    for rank in reversed(range(processes)):
        with process(rank, of=processes), opened[rank] as asking:
            _complete(asking, recipe)
            assert asking.asked.closed == "budget.max_requests: 9"
    assert len(teacher.asked) == 9 // processes * processes


def test_a_process_that_comes_later_sees_what_the_others_spent(teach: Any, even: Any, process: Any) -> None:
    """Its journal says so, even where a kill took the other's ledger."""
    recipe = even("rationales.budget.max_requests=8")
    teacher = teach(_no_to_all)
    with process(0, of=2), _open(recipe) as asking:
        _complete(asking, recipe)
    assert len(teacher.asked) == 4
    RunFolder(recipe.folder).ledger(0).unlink()
    with process(1, of=2), _open(recipe) as asking:
        _complete(asking, recipe)
    assert len(teacher.asked) == 4 + 2
    with process(0, of=1), _open(recipe) as asking:
        _complete(asking, recipe)
    assert len(teacher.asked) == 8


def test_bars_of_processes_have_names_of_their_own(teach: Any, even: Any, process: Any, sayings: Any) -> None:
    teach()
    recipe = even("evaluate.teacher=false")
    spec = recipe.rationales
    assert spec is not None
    with process(1, of=2), Asking(make_asker(recipe, spec), RunFolder(recipe.folder), sayings) as asking:
        _complete(asking, recipe)
    assert sayings.bars == {"rationales, train, process 1": (6, 6)}
