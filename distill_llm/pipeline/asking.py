"""This process's share of the questions to the teacher, and where it stands with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_llm.core.errors import ConfigError, TeacherError
from distill_llm.core.example import Example
from distill_llm.core.files import read_json, write_json
from distill_llm.core.journal import Entry, Journal
from distill_llm.core.prices import Prices
from distill_llm.core.processes import is_main_process, my_share, rank, world_size
from distill_llm.core.progress import Progress
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.rationales.dataset import judge
from distill_llm.rationales.generate import Asker, Round, Speaker, ask, completion_of, needs_hint, unanswered
from distill_llm.rationales.ledger import (
    Gate,
    Ledger,
    Spent,
    Tariff,
    account,
    cost_of,
    ledger_report,
    read_ledgers,
    spent_since,
    sum_up,
)
from distill_llm.rationales.spec import RationaleSpec
from distill_llm.teachers.base import Completion, Request

HINTED_SPLIT = "train"
"""Where the teacher may be shown the gold label: the other splits only choose, or score."""


@dataclass(slots=True)
class Asked:
    """What kept requests from being completed: why some failed, and the limit that closed the budget, if any."""

    failures: dict[str, str] = field(default_factory=dict)
    closed: str = ""


class Asking:
    """Asks a teacher for what its run folder's journals do not hold. Use as a context manager: it holds a lock."""

    def __init__(self, asker: Asker, run: RunFolder, progress: Progress):
        self.asker, self._run, self._progress = asker, run, progress
        journaled: dict[str, Spent] = defaultdict(Spent)
        by_all: dict[str, Spent] = defaultdict(Spent)
        own = run.journal(rank())
        others = [path for path in run.journals() if path != own]
        self.hinted_in_journal = 0
        self.asked = Asked()

        def count(entry: Entry, is_own: bool) -> None:
            self.hinted_in_journal += entry.get("hinted", False)
            completion = completion_of(entry)
            name = account(entry["split"], entry.get("teacher", ""))
            by_all[name].add(completion)
            if is_own:
                journaled[name].add(completion)

        self.journal = Journal(own, others=others, each=count)
        self.ledger = Ledger(run.ledger(rank()), journaled)
        # One gate for all rounds: this process's part of what was left when it began. Were it shared out anew before
        # each round, a fast process would take from a slow one's part what that one has not spent yet.
        self._gate = _gate(asker.spec, read_ledgers(run.ledgers()), by_all)

    def begin(self) -> None:
        """Notes where the ledger stands, so that what this command spends can be told from what others did."""
        if is_main_process():
            mine = {self._run.spent_before(number) for number in range(world_size())}
            for _, path in self._run.all_spent_before():
                if path not in mine:  # of an earlier command, which had more processes
                    path.unlink()
        self.ledger.save_as(self._run.spent_before(rank()))

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *exception: object) -> None:
        self.journal.close()

    def answer(self, key: str) -> Completion | None:
        return completion_of(self.journal.read(key)) if key in self.journal else None

    def count(self, wanted: Mapping[str, Sequence[Example]]) -> tuple[int, int]:
        """How many plain requests there are, of all processes, and how many of them are answered."""
        return self._count(self.requests(example, split) for split, examples in wanted.items() for example in examples)

    def count_hinted(self, wanted: Mapping[str, Sequence[Example]]) -> tuple[int, int]:
        """The same of the requests with a hint, as far as the plain ones are answered."""
        if self.asker.spec.hint_retry is None:
            return 0, 0
        return self._count(self.hinted(example, HINTED_SPLIT) for example in wanted[HINTED_SPLIT])

    def _count(self, made: Iterable[Sequence[Request]]) -> tuple[int, int]:
        total = found = 0
        for requests in made:
            total += len(requests)
            found += sum(request.key in self.journal for request in requests)
        return total, found

    def requests(self, example: Example, split: str) -> list[Request]:
        """The plain requests of one example; of teachers that were dropped, what they wrote before."""
        return self._of_those_who_speak(self.asker.requests(example, split))

    def complete(self, split: str, examples: Sequence[Example]) -> None:
        """Asks this process's share: first plainly, then, where every vote was wrong, with the gold label in sight.

        Teachers are asked one after the other, each about all examples. Raises what a teacher raises, unless the recipe
        drops one that fails: then TeacherError where none is left.
        """
        own = my_share(examples)
        for speaker in self.asker.speakers_of(split):
            self._turn(speaker, split, "", lambda who: (r for example in own for r in who.requests(example, split)))
        if split == HINTED_SPLIT and self.asker.spec.hint_retry is not None:
            wrong = [example for example in own if self.hinted(example, split)]
            for speaker in self.asker.speakers_of(split):
                self._turn(speaker, split, ", with a hint", lambda who: self._hinted(who, wrong, split))

    def hinted(self, example: Example, split: str) -> list[Request]:
        """The hinted requests of an example: none where a plain completion is right, or still missing."""
        requests = self.asker.hinted(example, split) if split == HINTED_SPLIT else []
        if not requests:
            return []
        plain = judge(self.requests(example, split), self.answer, self.asker.task)
        if any(judged.completion is None for judged in plain):
            return []
        wrong = needs_hint([judged.parsed for judged in plain], example, self.asker.task)
        return self._of_those_who_speak(requests) if wrong else []

    def _of_those_who_speak(self, requests: Sequence[Request]) -> list[Request]:
        silent = {speaker.voice.name for speaker in self.asker.speakers if speaker.dropped}
        return [request for request in requests if request.teacher not in silent or request.key in self.journal]

    def _hinted(self, speaker: Speaker, examples: Sequence[Example], split: str) -> Iterator[Request]:
        name = speaker.voice.name
        return (r for example in examples for r in self.asker.hinted(example, split) if r.teacher == name)

    def _turn(self, speaker: Speaker, split: str, what: str, requests: Callable[[Speaker], Iterator[Request]]) -> None:
        voice, drops = speaker.voice, self.asker.spec.drops_failing
        if speaker.dropped:
            return
        name = f"rationales, {voice.name}, {split}{what}" if voice.name else f"rationales, {split}{what}"
        name = f"{name}, process {rank()}" if world_size() > 1 else name
        try:
            turn = Round(name, 0, 0, samples=1 if what else voice.samples)
            self._round(speaker, split, turn, lambda: requests(speaker), checks=drops)
        except (ConfigError, TeacherError) as error:
            if not drops:
                raise
            drop(self.asker, speaker, str(error), self._run, self._progress)
        if len(self.asker.speakers) > 1:
            speaker.rest()

    def _round(
        self, speaker: Speaker, split: str, turn: Round, requests: Callable[[], Iterator[Request]], *, checks: bool
    ) -> None:
        for request in requests():
            turn.total += 1
            turn.done += request.key in self.journal
        if turn.done == turn.total:
            if turn.total:
                self._progress.advance(turn.name, turn.total, turn.total)
            return
        if checks:
            speaker.check()
        costs = account(split, speaker.voice.name)
        self.ledger.start(costs)
        try:
            ask(
                lambda: unanswered(requests(), self.journal, turn.failures),
                turn,
                teacher=speaker.teacher,
                task=self.asker.task,
                journal=self.journal,
                ledger=self.ledger,
                gate=self._gate,
                progress=self._progress,
            )
        finally:
            self.ledger.write(costs)
        self.asked.failures |= turn.failures
        self.asked.closed = self.asked.closed or turn.closed


def _gate(spec: RationaleSpec, ledgers: Mapping[str, Spent], journals: Mapping[str, Spent]) -> Gate:
    """``ledgers`` and ``journals``: what all processes spent, by account."""
    own = prices_of(spec)
    return Gate(
        spec.budget,
        spec.prices,
        sum_up(ledgers.values()).with_journal(sum_up(journals.values())),
        max_new_tokens=spec.sampling.max_new_tokens,
        processes=world_size(),
        tariffs={voice.name: Tariff(voice.prices, voice.sampling.max_new_tokens) for voice in spec.voices},
        cost=max(cost_of(accounts, spec.prices, own) for accounts in (ledgers, journals)),
    )


def prices_of(spec: RationaleSpec) -> dict[str, Prices]:
    """Those of each of several teachers."""
    return {voice.name: voice.prices for voice in spec.voices if voice.name}


def spent_in(run: RunFolder, spec: RationaleSpec) -> dict[str, Any]:
    """What asking came to: of all processes and commands, and of the latest command that asked."""
    latest = spent_since(run.all_spent_before())
    return ledger_report(read_ledgers(run.ledgers()), spec.prices, prices_of(spec), latest)


def drop(asker: Asker, speaker: Speaker, reason: str, run: RunFolder, progress: Progress) -> None:
    """Asks a teacher no more; says so, and leaves word for the process that writes the data set.

    Raises TeacherError where nobody is left.
    """
    speaker.dropped = reason
    name = speaker.voice.name
    path = run.dropped(rank())
    write_json(path, (read_json(path) if path.exists() else {}) | {name: reason})
    if all(other.dropped or not other.voice.votes for other in asker.speakers):
        raise TeacherError(f"rationales.teacher: every teacher failed, the last one, '{name}', so: {reason}")
    progress.say(f"warning: the teacher '{name}' is dropped (rationales.teacher.drop_failing): {reason}")


def hear_of_dropped(asker: Asker, run: RunFolder) -> None:
    """Takes over which teachers other processes, or earlier commands, dropped."""
    for path in run.all_dropped():
        for name, reason in read_json(path).items():
            for speaker in asker.speakers:
                if speaker.voice.name == name and not speaker.dropped:
                    speaker.dropped = reason
