"""The ledger adds up over kills and processes; the gate never lets more through than the budget."""

from __future__ import annotations

import json
import random
from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

from distill_llm.core.example import Example
from distill_llm.rationales.ledger import (
    Budget,
    Gate,
    Ledger,
    Prices,
    Spent,
    ledger_report,
    read_ledgers,
    spent_since,
    sum_up,
)
from distill_llm.teachers.base import Completion, Failure, Message, Request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from dataclasses import asdict
from dataclasses import asdict
from pathlib import Path

PRICES = Prices(input_per_million=2.0, output_per_million=10.0, currency="EUR")
LONGEST = 40  # max_new_tokens of the simulated teacher


def _request(number: int, prompt: Any = "x" * 90) -> Request:
    return Request(f"{number:x}", Example(str(number), "", ""), "train", 0, prompt)


def _gate(budget: Budget, spent: Spent | None = None, processes: int = 1) -> Gate:
    return Gate(budget, PRICES, spent or Spent(), max_new_tokens=LONGEST, processes=processes)


def test_what_a_result_adds() -> None:
    spent = Spent()
    spent.add(Completion("text", tokens_in=5, tokens_out=7, retries=2))
    spent.add(Failure("gone", retries=3))
    spent.add(Completion("text", tokens_in=1, tokens_out=1))
    assert spent == Spent(requests=8, retries=5, failures=1, completions=2, tokens_in=6, tokens_out=8)
    assert sum_up([spent, Spent(requests=1, seconds=2.5)]) == Spent(9, 5, 1, 2, 6, 8, 2.5)
    assert Spent(tokens_in=60, tokens_out=40, seconds=8.0).tokens_per_second == 12.5
    assert Spent(tokens_in=60).tokens_per_second == 0.0


def test_prices_are_for_a_million_tokens() -> None:
    assert PRICES.cost(3_000_000, 500_000) == pytest.approx(2 * 3 + 10 * 0.5)
    assert (PRICES.known, Prices().known, Prices(output_per_million=1).known) == (True, False, True)


class _Simulated:
    """Keeps ``in_flight`` requests under way, ends them in any order, and sends some of them again or in vain."""

    def __init__(self, seed: int, in_flight: int, failing: float = 0.0):
        self._chance, self._in_flight, self._failing = random.Random(seed), in_flight, failing

    def complete(self, gate: Gate, requests: Iterator[Request]) -> Spent:
        spent, waiting, source = Spent(), deque[Request](), gate.admit(requests)
        while True:
            while len(waiting) < self._in_flight and (request := next(source, None)) is not None:
                waiting.append(request)
            if not waiting:
                return spent
            waiting.rotate(self._chance.randrange(len(waiting)))
            request, result = waiting.popleft(), self._result()
            gate.settle(request, result)
            spent.add(result)

    def _result(self) -> Completion | Failure:
        if self._chance.random() < self._failing:
            return Failure("lost")
        return Completion("", tokens_in=self._chance.randint(1, 30), tokens_out=self._chance.randint(0, LONGEST))


def _used(spent: Spent, limit: str) -> float:
    return {
        "max_requests": spent.requests,
        "max_tokens": spent.tokens_in + spent.tokens_out,
        "max_cost": (spent.tokens_in * 2.0 + spent.tokens_out * 10.0) / 1e6,
    }[limit]


@pytest.mark.parametrize(("limit", "value"), [("max_requests", 57), ("max_tokens", 2_345), ("max_cost", 0.0123)])
@pytest.mark.parametrize("in_flight", [1, 7, 64])
def test_no_budget_is_overshot_with_many_in_flight(limit: str, value: float, in_flight: int) -> None:
    """Nor is more left than the next request might take: typed once, the budget is used."""
    most = {"max_requests": 1, "max_tokens": 46 + LONGEST, "max_cost": (46 * 2.0 + LONGEST * 10.0) / 1e6}[limit]
    for seed in range(5):
        gate, spent, requests = _gate(Budget.model_validate({limit: value})), Spent(), map(_request, range(10_000))
        teacher = _Simulated(seed, in_flight, failing=0.1)
        while (more := teacher.complete(gate, requests)).requests:
            spent = spent.plus(more)
        assert value - most < _used(spent, limit) <= value
        assert gate.closed.startswith(f"budget.{limit}: ")


def test_no_limit_lets_all_through() -> None:
    gate = _gate(Budget())
    assert _Simulated(0, 8).complete(gate, map(_request, range(500))).requests == 500
    assert gate.closed == ""


def test_the_first_limit_that_is_reached_is_named() -> None:
    gate = _gate(Budget(max_requests=1_000, max_tokens=10))
    assert list(gate.admit(map(_request, range(3)))) == []
    assert gate.closed == "budget.max_tokens: 10"


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_processes_share_what_is_left(processes: int) -> None:
    budget, before = Budget(max_tokens=10_000), Spent(requests=30, tokens_in=900, tokens_out=1_100)
    total = 0.0
    for process in range(processes):
        requests = map(_request, range(10_000))
        spent = _Simulated(process, 5).complete(_gate(budget, before, processes), requests)
        assert _used(spent, "max_tokens") <= 8_000 / processes
        total += _used(spent, "max_tokens")
    assert total > 8_000 - processes * 5 * (46 + LONGEST), "most of it is used"


def test_what_was_spent_before_counts() -> None:
    assert list(_gate(Budget(max_requests=5), Spent(requests=5)).admit([_request(0)])) == []
    assert list(_gate(Budget(max_requests=5), Spent(requests=9)).admit([_request(0)])) == []
    assert len(list(_gate(Budget(max_requests=5), Spent(requests=3)).admit(map(_request, range(9))))) == 2


def test_what_is_under_way_is_set_aside_whole() -> None:
    """Each of 90 bytes may be 46 tokens, and as many more as it may write."""
    for fit in (1, 3, 5):
        gate = _gate(Budget(max_tokens=fit * (46 + LONGEST)))
        assert len(list(gate.admit(map(_request, range(9))))) == fit


def test_a_retry_is_known_only_when_it_came_back() -> None:
    """Retries of what is under way count, but cannot be foreseen: a budget of requests may be missed by so many."""
    gate, requests = _gate(Budget(max_requests=5)), map(_request, range(9))
    admitted = gate.admit(requests)
    gate.settle(next(admitted), Completion("", 1, 1, retries=3))
    gate.settle(next(admitted), Completion("", 1, 1))
    assert list(admitted) == []
    assert gate.closed == "budget.max_requests: 5"


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("who pays more ?", 4),
        ("谁付得更多" * 20, 100),  # a token a character
        ("7 + 5 = 12 . so ann pays more . " * 10, 120),  # a token a digit
        ("кто платит больше ? " * 10, 80),
        ((Message("system", "Be brief."), Message("user", "who ?")), 30),  # with what a chat template adds
    ],
    ids=["English", "Chinese", "sums", "Russian", "chat"],
)
def test_enough_is_set_aside_for_a_prompt(prompt: Any, tokens: int) -> None:
    """The real number of tokens is known only afterwards; the numbers here are those of usual tokenizers."""
    budget = Budget(max_tokens=tokens + LONGEST - 1)
    assert list(_gate(budget).admit([_request(0, prompt)])) == []
    assert list(_gate(Budget(max_tokens=20 * tokens + LONGEST)).admit([_request(0, prompt)])) != []


def test_a_ledger_is_written_and_found_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.json", {})
    assert not (tmp_path / "ledger.json").exists(), "nothing was spent yet"
    ledger.start("train")
    ledger.add("train", Completion("", 5, 7))
    ledger.add("train", Failure("lost", retries=2))
    ledger.write("train")
    found = json.loads((tmp_path / "ledger.json").read_text())["train"]
    assert found | {"seconds": 0} == {
        "requests": 4, "retries": 2, "failures": 1, "completions": 1, "tokens_in": 5, "tokens_out": 7, "seconds": 0,
    }  # fmt: skip
    again = Ledger(tmp_path / "ledger.json", {"train": Spent(requests=1, completions=1, tokens_in=5, tokens_out=7)})
    assert again.accounts["train"].requests == 4
    again.start("train")
    again.add("train", Completion("", 1, 1))
    assert again.accounts["train"].completions == 2


def test_time_is_that_of_asking_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("distill_llm.rationales.ledger.time.monotonic", lambda: now)
    ledger = Ledger(tmp_path / "ledger.json", {})
    now += 50  # the teacher is loaded
    ledger.start("train")
    now += 3
    ledger.add("train", Completion("", 1, 1))
    assert json.loads((tmp_path / "ledger.json").read_text())["train"]["seconds"] == 3
    now += 4
    ledger.add("train", Completion("", 1, 1))  # a kill would lose so much of the ledger, and nothing of the journal
    assert json.loads((tmp_path / "ledger.json").read_text())["train"]["completions"] == 1
    ledger.write("train")
    now += 1000
    ledger.start("test")
    now += 2
    ledger.write("test")
    assert {split: spent.seconds for split, spent in ledger.accounts.items()} == {"train": 7, "test": 2}


JOURNALED = Spent(requests=11, retries=1, completions=10, tokens_in=50, tokens_out=70)


@pytest.mark.parametrize(
    ("ledger", "expected"),
    [
        (Spent(), JOURNALED),  # lost
        (Spent(3, 0, 1, 2, 10, 14, 4.0), Spent(12, 1, 1, 10, 50, 70, 4.0)),  # some seconds old
        (Spent(14, 2, 2, 10, 50, 70, 9.0), Spent(14, 2, 2, 10, 50, 70, 9.0)),  # it knows of failures besides
        (Spent(12, 1, 0, 11, 55, 77, 9.0), Spent(12, 1, 0, 11, 55, 77, 9.0)),  # a line was deleted: it was paid for
    ],
    ids=["lost", "old", "whole", "more"],
)
def test_a_ledger_says_at_least_what_the_journal_holds(tmp_path: Path, ledger: Spent, expected: Spent) -> None:
    path = tmp_path / "ledger.json"
    if ledger != Spent():
        path.write_text(json.dumps({"train": {name: getattr(ledger, name) for name in Spent.__slots__}}))
    assert Ledger(path, {"train": JOURNALED}).accounts == {"train": expected}
    assert read_ledgers([path]) == {"train": expected}, "it is mended on disk too"


def test_ledgers_of_processes_add_up_but_not_their_seconds(tmp_path: Path) -> None:
    for process, seconds in enumerate((4.0, 6.0)):
        ledger = Ledger(tmp_path / f"{process}.json", {"train": JOURNALED, "test": Spent(requests=process)})
        ledger.accounts["train"].seconds = seconds
        ledger.start("train")
        ledger.write("train")
    found = read_ledgers(sorted(tmp_path.iterdir()))
    assert found["train"].seconds == pytest.approx(6.0, abs=0.1)
    assert (found["train"].completions, found["train"].tokens_out, found["test"].requests) == (20, 140, 1)


def test_what_was_spent_since_is_the_difference_and_its_seconds_the_longest(tmp_path: Path) -> None:
    pairs = []
    for process, seconds in enumerate((4.0, 6.0)):
        before, now = tmp_path / f"before.{process}.json", tmp_path / f"{process}.json"
        then = Spent(3, 1, 1, 2, 10, 14, 100.0)
        before.write_text(json.dumps({"train": asdict(then)}))
        new = Spent(process, 0, 0, process, 5, 7, seconds)
        now.write_text(json.dumps({"train": asdict(then.plus(new)), "test": asdict(new)}))
        pairs.append((now, before))
    pairs.append((tmp_path / "never spent.json", tmp_path / "nor before.json"))
    assert spent_since(pairs) == dict.fromkeys(("train", "test"), Spent(1, 0, 0, 1, 10, 14, 6.0))


def test_a_report_has_every_split_the_total_the_rate_and_the_cost() -> None:
    splits = {"train": Spent(requests=4, completions=4, tokens_in=900_000, tokens_out=100_000, seconds=10.0)}
    splits["test"] = Spent(requests=1, failures=1, seconds=10.0)
    report = ledger_report(splits, PRICES)
    assert list(report) == ["train", "test", "total"]
    assert report["total"] == {
        "requests": 5, "retries": 0, "failures": 1, "completions": 4, "tokens_in": 900_000, "tokens_out": 100_000,
        "seconds": 20.0, "tokens_per_second": 50_000.0, "cost": 2.8, "currency": "EUR",
    }  # fmt: skip
    assert (report["train"]["tokens_per_second"], report["train"]["cost"], report["test"]["cost"]) == (1e5, 2.8, 0.0)
    latest = ledger_report(splits, PRICES, latest={"train": Spent(requests=2, tokens_in=90_000, seconds=3.0)})["latest"]
    assert (latest["requests"], latest["tokens_per_second"], latest["cost"]) == (2, 30_000.0, 0.18)
    free = ledger_report(splits, Prices())["total"]
    assert (free["cost"], free["currency"]) == (None, None)
