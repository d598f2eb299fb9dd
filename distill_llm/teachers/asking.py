"""Asking a server for many completions at once: a bounded number in flight, with patience, and ended without losses.

All questions run in one event loop in a thread of its own, so that hundreds of them cost one thread, and so that ending
early closes their connections instead of waiting for a server that does not answer.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Protocol

from distill_llm.core.errors import TeacherError
from distill_llm.teachers.base import Completion, Failure, Request

LONGEST_TOLD_WAIT_SECONDS = 600.0
LONGEST_WAIT_SECONDS = 60.0
FAILURES_IN_A_ROW = 10
QUOTED_CHARACTERS = 500

_ENDING_SECONDS = 10.0
_log = logging.getLogger(__name__)


class TryAgain(Exception):
    """An attempt that came to nothing where another may succeed.

    ``told_seconds``: the wait that the server asks for. ``all_wait``: it is the server that is busy, so that every
    request has to wait, not only this one.
    """

    def __init__(self, reason: str, *, told_seconds: float | None = None, all_wait: bool = False):
        super().__init__(reason)
        self.reason, self.told_seconds, self.all_wait = reason, told_seconds, all_wait


class Refused(Exception):
    """A request that the server will not answer. ``alone``: for a reason that says nothing about other requests."""

    def __init__(self, reason: str, *, alone: bool = False):
        super().__init__(reason)
        self.reason, self.alone = reason, alone


class Connection(Protocol):
    """A server, as the event loop sees it."""

    async def attempt(self, request: Request, retries: int) -> Completion:
        """Asks once. Raises TryAgain, Refused, or TeacherError where no request will ever be answered."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Manners:
    """How a server is asked."""

    concurrency: int
    timeout_seconds: float
    max_retries: int
    backoff_seconds: float


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of one request. ``counts``: it is a failure that may mean that all others fail too."""

    result: Completion | Failure
    counts: bool = False


def told_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: ``retry-after-ms``, or ``retry-after`` in seconds or as an HTTP date."""
    try:
        return max(0.0, float(headers["retry-after-ms"]) / 1000)
    except (KeyError, ValueError):
        told = headers.get("retry-after", "")
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def backoff(retries: int, first_seconds: float) -> float:
    """A random wait of at most ``first_seconds``, twice that after each retry, and a minute in the end."""
    return random.uniform(0, min(LONGEST_WAIT_SECONDS, first_seconds * 2.0 ** min(retries, 30)))


def quoted(text: str, key: str) -> str:
    """The beginning of what a server says, without ``key``, which it may echo, and what else is sent as one."""
    hidden = text.replace(key, "[hidden]") if key else text
    return re.sub(r"(?i)\bbearer\s+\S+", "Bearer [hidden]", hidden)[:QUOTED_CHARACTERS]


def cause_of(error: Exception, key: str) -> str:
    """Why a connection failed, as the layer below says it."""
    cause = error.__cause__ or error
    return quoted(f"{type(cause).__name__}: {cause}".rstrip(": "), key)


class Inquiry:
    """One series of questions. Used once.

    ``answers`` advances the iterable of requests in the caller's thread only. At a KeyboardInterrupt, and where asking
    on is no use, nothing more is asked; what was asked already still comes back (it is paid for), and then the error
    is raised. A second KeyboardInterrupt ends at once. An interrupted caller can hand it on with ``throw``.
    """

    def __init__(self, connect: Callable[[], Connection], manners: Manners):
        self._connect, self._manners = connect, manners
        self._pending: dict[concurrent.futures.Future[_Outcome], Request] = {}
        self._failures = 0
        self._not_before = 0.0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="asking", daemon=True)
        self._connection: Connection
        self._loop: asyncio.AbstractEventLoop
        self._over: asyncio.Event
        self._no_more: asyncio.Event

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion | Failure]]:
        source = iter(requests)
        stop: BaseException | None = None
        self._connection = self._connect()
        try:
            self._thread.start()
            self._ready.wait()
            while True:
                try:
                    if stop is None:
                        self._fill(source)
                    if not self._pending:
                        break
                    request, outcome = self._first_done()
                    self._count(outcome)
                    yield request, outcome.result
                    if self._failures >= FAILURES_IN_A_ROW and stop is None:
                        stop = self._hopeless(outcome.result)
                except KeyboardInterrupt as interrupt:
                    if stop is not None:
                        raise
                    stop = interrupt
                except TeacherError as error:
                    stop = stop or error
                if stop is not None:
                    self._loop.call_soon_threadsafe(self._no_more.set)
        finally:
            self._end()
        if stop is not None:
            raise stop

    def _fill(self, source: Iterator[Request]) -> None:
        while len(self._pending) < self._manners.concurrency:
            request = next(source, None)
            if request is None:
                return
            self._pending[asyncio.run_coroutine_threadsafe(self._ask(request), self._loop)] = request

    def _first_done(self) -> tuple[Request, _Outcome]:
        """Waits for one, and takes it out of what is pending; raises the TeacherError that it met."""
        waiting = concurrent.futures.FIRST_COMPLETED
        done: set[concurrent.futures.Future[_Outcome]] = set()
        while not done:  # a wait without an end cannot be interrupted on every platform
            done = concurrent.futures.wait(self._pending, timeout=0.5, return_when=waiting).done
        future = done.pop()
        request = self._pending[future]
        del self._pending[future]
        return request, future.result()

    def _count(self, outcome: _Outcome) -> None:
        if isinstance(outcome.result, Completion):
            self._failures = 0
        elif outcome.counts:
            self._failures += 1

    def _hopeless(self, result: Completion | Failure) -> TeacherError:
        reason = result.reason if isinstance(result, Failure) else ""
        return TeacherError(
            f"rationales.teacher: {FAILURES_IN_A_ROW} requests in a row came to nothing. The last one: "
            f"{reason.rstrip('.')}. Asking on would not help: remove the cause and type the same command again; what "
            "was answered is kept."
        )

    async def _ask(self, request: Request) -> _Outcome:
        """One request, until it is answered, refused, or retried too often."""
        retries, not_before, reason = 0, 0.0, "no answer yet."
        while await self._may_go_on(not_before):
            try:
                async with asyncio.timeout(self._manners.timeout_seconds):
                    return _Outcome(await self._connection.attempt(request, retries))
            except TimeoutError:
                again = TryAgain(f"no answer within {self._manners.timeout_seconds:g} seconds (`timeout_seconds`).")
            except TryAgain as error:
                again = error
            except Refused as error:
                return _Outcome(Failure(error.reason, retries), counts=not error.alone)
            reason, wait = again.reason, again.told_seconds or backoff(retries, self._manners.backoff_seconds)
            if wait > LONGEST_TOLD_WAIT_SECONDS:
                reason = f"the server asks to wait {wait:.0f} seconds, more than ten minutes: {reason}"
                return _Outcome(Failure(reason, retries), counts=True)
            if retries >= self._manners.max_retries:
                return _Outcome(Failure(f"given up after {retries} retries: {reason}", retries), counts=True)
            _log.info("asked again in %.1f seconds: %s", wait, reason)
            retries, not_before = retries + 1, time.monotonic() + wait
            if again.all_wait:
                self._not_before = max(self._not_before, not_before)
        return _Outcome(Failure(f"Stopped before it was asked again: {reason}", max(0, retries - 1)))

    async def _may_go_on(self, not_before: float) -> bool:
        """Waits until the request's own wait and that of all are over; False where nothing more is to be asked."""
        while not self._no_more.is_set():
            seconds = max(not_before, self._not_before) - time.monotonic()
            if seconds <= 0:
                return True
            try:
                await asyncio.wait_for(self._no_more.wait(), seconds)
            except TimeoutError:
                continue
        return False

    async def _serve(self) -> None:
        """The thread's work: keeps the loop alive until all is over, then ends what still runs."""
        self._loop, self._over, self._no_more = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        self._ready.set()
        await self._over.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._connection.close()

    def _end(self) -> None:
        if self._ready.wait(_ENDING_SECONDS):
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join(_ENDING_SECONDS)
