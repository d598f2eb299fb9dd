"""This process's share of the questions to the teacher, and where it stands with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from distill_llm.core.example import Example
from distill_llm.core.journal import Entry, Journal
from distill_llm.core.processes import my_share, rank, world_size
from distill_llm.core.progress import Progress
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.rationales.dataset import judge
from distill_llm.rationales.generate import Asker, Round, ask, completion_of, needs_hint, unanswered
from distill_llm.rationales.ledger import Gate, Ledger, Spent, read_ledgers, sum_up
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
        by_all = Spent()
        own = run.journal(rank())
        others = [path for path in run.journals() if path != own]
        self.hinted_in_journal = 0
        self.asked = Asked()

        def count(entry: Entry, is_own: bool) -> None:
            self.hinted_in_journal += entry.get("hinted", False)
            completion = completion_of(entry)
            by_all.add(completion)
            if is_own:
                journaled[entry["split"]].add(completion)

        self.journal = Journal(own, others=others, each=count)
        self.ledger = Ledger(run.ledger(rank()), journaled)
        # One gate for all rounds: this process's part of what was left when it began. Were it shared out anew before
        # each round, a fast process would take from a slow one's part what that one has not spent yet.
        self._gate = Gate(
            asker.spec.budget,
            asker.spec.prices,
            sum_up(read_ledgers(run.ledgers()).values()).with_journal(by_all),
            max_new_tokens=asker.spec.sampling.max_new_tokens,
            processes=world_size(),
        )

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *exception: object) -> None:
        self.journal.close()

    def answer(self, key: str) -> Completion | None:
        return completion_of(self.journal.read(key)) if key in self.journal else None

    def count(self, wanted: Mapping[str, Sequence[Example]]) -> tuple[int, int]:
        """How many plain requests there are, of all processes, and how many of them are answered."""
        return self._count(
            self.asker.requests(example, split) for split, examples in wanted.items() for example in examples
        )

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

    def complete(self, split: str, examples: Sequence[Example]) -> None:
        """Asks this process's share: first plainly, then, where every vote was wrong, with the gold label in sight."""
        own = my_share(examples)
        self._round(split, f"rationales, {split}", lambda: self._plain(own, split))
        if split == HINTED_SPLIT and self.asker.spec.hint_retry is not None:
            wrong = [example for example in own if self.hinted(example, split)]
            name = f"rationales, {split}, with a hint"
            self._round(split, name, lambda: self._hinted(wrong, split))

    def hinted(self, example: Example, split: str) -> list[Request]:
        """The hinted requests of an example: none where a plain completion is right, or still missing."""
        requests = self.asker.hinted(example, split) if split == HINTED_SPLIT else []
        if not requests:
            return []
        plain = judge(self.asker.requests(example, split), self.answer, self.asker.task)
        if any(judged.completion is None for judged in plain):
            return []
        return requests if needs_hint([judged.parsed for judged in plain], example, self.asker.task) else []

    def _plain(self, examples: Sequence[Example], split: str) -> Iterator[Request]:
        return (request for example in examples for request in self.asker.requests(example, split))

    def _hinted(self, examples: Sequence[Example], split: str) -> Iterator[Request]:
        return (request for example in examples for request in self.asker.hinted(example, split))

    def _round(self, split: str, name: str, requests: Callable[[], Iterator[Request]]) -> None:
        total = waiting = 0
        for request in requests():
            total += 1
            waiting += request.key not in self.journal
        turn = Round(f"{name}, process {rank()}" if world_size() > 1 else name, total, total - waiting)
        if not waiting:
            if total:
                self._progress.advance(turn.name, total, total)
            return
        self.ledger.start(split)
        try:
            ask(
                lambda: unanswered(requests(), self.journal, turn.failures),
                turn,
                asker=self.asker,
                journal=self.journal,
                ledger=self.ledger,
                gate=self._gate,
                progress=self._progress,
            )
        finally:
            self.ledger.write(split)
        self.asked.failures |= turn.failures
        self.asked.closed = self.asked.closed or turn.closed
