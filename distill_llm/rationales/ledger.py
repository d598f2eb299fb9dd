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
from distill_llm.core.prices import Prices

if TYPE_CHECKING:
    from distill_llm.teachers.base import Completion, Failure, Request

_WRITE_SECONDS = 5.0
_BYTES_A_TOKEN = 2  # fewer than in nearly any text, sums too: what is set aside for a request is rather too much
_TOKENS_A_TURN = 16  # what a chat template puts around a message, and before the first


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

    def minus(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(Spent)))

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


def account(split: str, teacher: str) -> str:
    """The name in ledgers of what a teacher costs on a split; that of one teacher alone is the split's."""
    return f"{split}/{teacher}" if teacher else split


class Ledger:
    """One process's file of what was spent, by account; written every few seconds, and when a split is done."""

    def __init__(self, path: Path, journal: Mapping[str, Spent]):
        """``journal``: what the completions in this process's journal came to, by account."""
        self._path = path
        self.accounts = _read(path)
        for name, spent in journal.items():
            self.accounts[name] = self.accounts.get(name, Spent()).with_journal(spent)
        self._since = self._written = time.monotonic()
        if self.accounts:
            self._save()

    def start(self, name: str) -> None:
        self.accounts.setdefault(name, Spent())
        self._since = time.monotonic()

    def add(self, name: str, result: Completion | Failure) -> None:
        self.accounts[name].add(result)
        if time.monotonic() - self._written > _WRITE_SECONDS:
            self.write(name)

    def write(self, name: str) -> None:
        now = time.monotonic()
        self.accounts[name].seconds = round(self.accounts[name].seconds + now - self._since, 3)
        self._since = self._written = now
        self._save()

    def save_as(self, path: Path) -> None:
        """A copy of where it stands."""
        write_json(path, {name: asdict(spent) for name, spent in self.accounts.items()})

    def _save(self) -> None:
        self.save_as(self._path)


def read_ledgers(paths: Iterable[Path]) -> dict[str, Spent]:
    """What all processes spent, by account. Side by side, the seconds are those of the longest."""
    return _side_by_side(_read(path) for path in paths)


def spent_since(paths: Iterable[tuple[Path, Path]]) -> dict[str, Spent]:
    """What processes spent since another file was written: pairs of a ledger and of what it held then."""
    ledgers = [(_read(now), _read(before)) for now, before in paths]
    return _side_by_side({n: spent.minus(then.get(n, Spent())) for n, spent in now.items()} for now, then in ledgers)


def _read(path: Path) -> dict[str, Spent]:
    """Nothing where there is no file: that process has spent nothing."""
    return {name: Spent(**spent) for name, spent in read_json(path).items()} if path.exists() else {}


def _side_by_side(ledgers: Iterable[Mapping[str, Spent]]) -> dict[str, Spent]:
    found: dict[str, list[Spent]] = {}
    for accounts in ledgers:
        for name, spent in accounts.items():
            found.setdefault(name, []).append(spent)
    totals = {name: sum_up(parts) for name, parts in found.items()}
    for name, parts in found.items():
        totals[name].seconds = max(part.seconds for part in parts)
    return totals


def cost_of(accounts: Mapping[str, Spent], prices: Prices, own: Mapping[str, Prices]) -> float:
    """What all of it cost; ``own``: prices of those of several teachers that have their own."""
    return sum(
        own.get(name.partition("/")[2], prices).cost(spent.tokens_in, spent.tokens_out)
        for name, spent in accounts.items()
    )


def ledger_report(
    accounts: Mapping[str, Spent],
    prices: Prices,
    own: Mapping[str, Prices] | None = None,
    latest: Mapping[str, Spent] | None = None,
) -> dict[str, Any]:
    """The ledger as files, cards and tables show it: each split and the total, with rates and money; of several
    teachers each of them too. ``own``: prices of those that have their own. ``latest``: the part of the
    latest command that asked.
    """
    own = own or {}
    known = [one for one in (*own.values(), prices) if one.known]

    def shown(parts: Mapping[str, Spent]) -> dict[str, Any]:
        spent = sum_up(parts.values())
        return asdict(spent) | {
            "tokens_per_second": spent.tokens_per_second,
            "cost": round(cost_of(parts, prices, own), 6) if known else None,
            "currency": known[0].currency if known else None,
        }

    def those(place: int, name: str) -> dict[str, Spent]:
        return {key: spent for key, spent in accounts.items() if key.partition("/")[place] == name}

    splits, teachers = ({key.partition("/")[place]: None for key in accounts} for place in (0, 2))
    named = {name: shown(those(2, name)) for name in teachers if name}
    return (
        {split: shown(those(0, split)) for split in splits}
        | {"total": shown(accounts)}
        | ({"latest": shown(latest)} if latest is not None else {})
        | ({"teachers": named} if named else {})
    )


@dataclass(frozen=True, slots=True)
class Tariff:
    """What a request to one of several teachers may come to."""

    prices: Prices
    max_new_tokens: int


class Gate:
    """Lets requests through while the budget holds. What a request may cost at most is set aside until it is known.

    ``spent`` is what all processes spent before, ``cost`` in money where ``prices`` does not tell; ``processes`` share
    what is left in equal parts. ``tariffs``: of teachers that have their own.
    """

    def __init__(
        self,
        budget: Budget,
        prices: Prices,
        spent: Spent,
        *,
        max_new_tokens: int,
        processes: int = 1,
        tariffs: Mapping[str, Tariff] | None = None,
        cost: float | None = None,
    ):
        self._usual, self._tariffs = Tariff(prices, max_new_tokens), tariffs or {}
        tokens = spent.tokens_in + spent.tokens_out
        money = prices.cost(spent.tokens_in, spent.tokens_out) if cost is None else cost
        before = {"max_requests": spent.requests, "max_tokens": tokens, "max_cost": money}
        self._limits = {name: getattr(budget, name) for name in before}
        self._left = {n: max(0.0, self._limits[n] - before[n]) / processes for n in before if self._limits[n]}
        self._requests = 0
        self._tokens: dict[str, tuple[int, int]] = {}
        self._aside: dict[str, tuple[int, int]] = {}
        self.closed = ""

    def admit(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Ends before ``requests`` do where the next one might break the budget; ``closed`` then says which limit."""
        for request in requests:
            most = (_most_tokens_in(request), self._tariff(request.teacher).max_new_tokens)
            self.closed = self._why_closed(request.teacher, most) if self._left else ""
            if self.closed:
                return
            self._aside[request.key] = most
            self._count(request.teacher, 1, *most)
            yield request

    def settle(self, request: Request, result: Completion | Failure) -> None:
        tokens_in, tokens_out = self._aside.pop(request.key)
        spent = Spent()
        spent.add(result)
        self._count(request.teacher, spent.requests - 1, spent.tokens_in - tokens_in, spent.tokens_out - tokens_out)

    def _tariff(self, teacher: str) -> Tariff:
        return self._tariffs.get(teacher, self._usual)

    def _count(self, teacher: str, requests: int, tokens_in: int, tokens_out: int) -> None:
        self._requests += requests
        before = self._tokens.get(teacher, (0, 0))
        self._tokens[teacher] = (before[0] + tokens_in, before[1] + tokens_out)

    def _why_closed(self, teacher: str, most: tuple[int, int]) -> str:
        mine = self._tokens.get(teacher, (0, 0))
        tokens = self._tokens | {teacher: (mine[0] + most[0], mine[1] + most[1])}
        needed = {
            "max_requests": self._requests + 1,
            "max_tokens": sum(map(sum, tokens.values())),
            "max_cost": sum(self._tariff(name).prices.cost(*pair) for name, pair in tokens.items()),
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
