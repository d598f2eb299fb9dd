"""What asking a teacher came to: requests, tokens, seconds, money; and the budget that ends it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from distill_llm.core.component import Component
from distill_llm.core.files import read_json, write_json

if TYPE_CHECKING:
    from distill_llm.teachers.base import Completion, Failure, Request

_WRITE_SECONDS = 5.0
_BYTES_A_TOKEN = 2  # fewer than in nearly any text, sums too: what is set aside for a request is rather too much
_TOKENS_A_TURN = 16  # what a chat template puts around a message, and before the first


class Prices(Component):
    """What a hosted teacher costs, in one currency, for a million tokens."""

    input_per_million: float = Field(default=0.0, ge=0)
    output_per_million: float = Field(default=0.0, ge=0)
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")

    @property
    def known(self) -> bool:
        return self.input_per_million > 0 or self.output_per_million > 0

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.input_per_million + tokens_out * self.output_per_million) / 1e6


class Budget(Component):
    """The most that one run folder may ever ask for, however often the command is typed; 0 is no limit."""

    max_requests: int = Field(default=0, ge=0, description="requests sent, retries and failures included")
    max_tokens: int = Field(default=0, ge=0, description="tokens read and written by the teacher")
    max_cost: float = Field(default=0.0, ge=0, description="in the currency of `prices`")


@dataclass(slots=True)
class Spent:
    """Sums. ``requests`` counts what was sent: completions, failures, and the retries of both."""

    requests: int = 0
    retries: int = 0
    failures: int = 0
    completions: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0

    def add(self, result: Completion | Failure) -> None:
        from distill_llm.teachers.base import Failure

        self.requests += 1 + result.retries
        self.retries += result.retries
        if isinstance(result, Failure):
            self.failures += 1
            return
        self.completions += 1
        self.tokens_in += result.tokens_in
        self.tokens_out += result.tokens_out

    @property
    def tokens_per_second(self) -> float:
        return round((self.tokens_in + self.tokens_out) / self.seconds, 1) if self.seconds else 0.0

    def plus(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Spent)))

    def with_journal(self, journal: Spent) -> Spent:
        """At least what the journal holds: a kill may lose the last seconds of a ledger, never a journal line."""
        return Spent(
            requests=max(self.requests, journal.requests + self.failures),
            retries=max(self.retries, journal.retries),
            failures=self.failures,
            completions=max(self.completions, journal.completions),
            tokens_in=max(self.tokens_in, journal.tokens_in),
            tokens_out=max(self.tokens_out, journal.tokens_out),
            seconds=self.seconds,
        )


class Ledger:
    """One process's file of what was spent, by split; written every few seconds, and when a split is done."""

    def __init__(self, path: Path, journal: Mapping[str, Spent]):
        """``journal``: what the completions in this process's journal came to, by split."""
        self._path = path
        found = read_json(path) if path.exists() else {}
        self.splits = {split: Spent(**spent) for split, spent in found.items()}
        for split, spent in journal.items():
            self.splits[split] = self.splits.get(split, Spent()).with_journal(spent)
        self._since = self._written = time.monotonic()
        if self.splits:
            self._save()

    def start(self, split: str) -> None:
        self.splits.setdefault(split, Spent())
        self._since = time.monotonic()

    def add(self, split: str, result: Completion | Failure) -> None:
        self.splits[split].add(result)
        if time.monotonic() - self._written > _WRITE_SECONDS:
            self.write(split)

    def write(self, split: str) -> None:
        now = time.monotonic()
        self.splits[split].seconds = round(self.splits[split].seconds + now - self._since, 3)
        self._since = self._written = now
        self._save()

    def _save(self) -> None:
        write_json(self._path, {name: asdict(spent) for name, spent in self.splits.items()})


def read_ledgers(paths: Iterable[Path]) -> dict[str, Spent]:
    """What all processes spent, by split. Side by side, the seconds are those of the longest."""
    found: dict[str, list[Spent]] = {}
    for path in paths:
        for split, spent in read_json(path).items():
            found.setdefault(split, []).append(Spent(**spent))
    totals = {split: sum_up(parts) for split, parts in found.items()}
    for split, parts in found.items():
        totals[split].seconds = max(part.seconds for part in parts)
    return totals


def ledger_report(splits: dict[str, Spent], prices: Prices) -> dict[str, Any]:
    """The ledger as files, cards and tables show it: each split and the total, with rates and money."""
    parts = {**splits, "total": sum_up(splits.values())}
    return {
        name: asdict(spent)
        | {
            "tokens_per_second": spent.tokens_per_second,
            "cost": round(prices.cost(spent.tokens_in, spent.tokens_out), 6) if prices.known else None,
            "currency": prices.currency if prices.known else None,
        }
        for name, spent in parts.items()
    }


class Gate:
    """Lets requests through while the budget holds. What a request may cost at most is set aside until it is known.

    ``spent`` is what all processes spent before; ``processes`` share what is left in equal parts.
    """

    def __init__(self, budget: Budget, prices: Prices, spent: Spent, *, max_new_tokens: int, processes: int = 1):
        self._prices, self._max_new_tokens = prices, max_new_tokens
        tokens, cost = spent.tokens_in + spent.tokens_out, prices.cost(spent.tokens_in, spent.tokens_out)
        before = {"max_requests": spent.requests, "max_tokens": tokens, "max_cost": cost}
        limits = {name: getattr(budget, name) for name in before}
        self._left = {n: max(0.0, limits[n] - before[n]) / processes for n in before if limits[n]}
        self._limits = limits
        self._now = Spent()
        self._aside: dict[str, int] = {}
        self._tokens_aside = 0
        self.closed = ""

    def admit(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Ends before ``requests`` do where the next one might break the budget; ``closed`` then says which limit."""
        for request in requests:
            self.closed = self._why_closed(request) if self._left else ""
            if self.closed:
                return
            self._aside[request.key] = _most_tokens_in(request)
            self._tokens_aside += self._aside[request.key]
            yield request

    def settle(self, request: Request, result: Completion | Failure) -> None:
        self._tokens_aside -= self._aside.pop(request.key)
        self._now.add(result)

    def _why_closed(self, request: Request) -> str:
        waiting = len(self._aside) + 1
        tokens_in = self._now.tokens_in + self._tokens_aside + _most_tokens_in(request)
        tokens_out = self._now.tokens_out + waiting * self._max_new_tokens
        needed = {
            "max_requests": self._now.requests + waiting,
            "max_tokens": tokens_in + tokens_out,
            "max_cost": self._prices.cost(tokens_in, tokens_out),
        }
        short = [name for name, left in self._left.items() if needed[name] > left]
        return f"budget.{short[0]}: {self._limits[short[0]]:,}" if short else ""


def _most_tokens_in(request: Request) -> int:
    prompt = request.prompt
    texts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    around = 0 if isinstance(prompt, str) else _TOKENS_A_TURN * (len(texts) + 1)
    return sum(len(text.encode(errors="replace")) // _BYTES_A_TOKEN + 1 for text in texts) + around


def sum_up(parts: Iterable[Spent]) -> Spent:
    total = Spent()
    for part in parts:
        total = total.plus(part)
    return total
