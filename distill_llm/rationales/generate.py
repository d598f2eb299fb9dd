"""Asking a teacher: requests that are not in the journal are completed, and journaled before anything else."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distill_llm.core.files import fingerprint
from distill_llm.rationales.ledger import account
from distill_llm.rationales.parse import Parsed, parse
from distill_llm.rationales.prompts import hinted
from distill_llm.rationales.vote import vote
from distill_llm.tasks.wording import bare_question
from distill_llm.teachers.base import Completion, Failure, Request, TextTeacher, TokenScores

if TYPE_CHECKING:
    from distill_llm.core.example import Example
    from distill_llm.core.journal import Entry, Journal
    from distill_llm.core.progress import Progress
    from distill_llm.rationales.ledger import Gate, Ledger
    from distill_llm.rationales.prompts import HintSpec, Prompter
    from distill_llm.rationales.spec import RationaleSpec
    from distill_llm.rationales.voices import Voice
    from distill_llm.tasks.base import Task

_WAITING_EXAMPLES = 10_000  # what a bar may hold in memory


class Speaker:
    """One voice with its teacher. A request's key changes with all that decides the completion, and nothing else.

    ``dropped`` says why it is asked no more, if it is not.
    """

    def __init__(self, voice: Voice, prompter: Prompter, task: Task, seed: int, teacher: TextTeacher | None = None):
        self.voice, self._prompter, self._task, self._seed = voice, prompter, task, seed
        self.dropped = ""
        self._opened = teacher
        self._same_for_all = ""

    @property
    def teacher(self) -> TextTeacher:
        """Opened when it is first needed. Raises ConfigError or TeacherError where it cannot be."""
        if self._opened is None:
            self._opened = self.voice.teacher.open(task=self._task, sampling=self.voice.sampling, seed=self._seed)
        return self._opened

    def know(self) -> str:
        """What all of its keys hold; raises as ``teacher`` does."""
        if not self._same_for_all:
            sampling = self.voice.sampling.model_dump(mode="json")
            drawn = self._seed if self.voice.sampling.temperature > 0 else 0  # greedy text does not depend on the seed
            parts = [self.teacher.identity, sampling, drawn, self._prompter.fingerprint]
            self._same_for_all = fingerprint(parts)
        return self._same_for_all

    def check(self) -> None:
        """Raises ConfigError where the teacher cannot be had."""
        self.voice.teacher.check(chat=self.voice.prompt.style == "chat", sampling=self.voice.sampling)

    def rest(self) -> None:
        """Lets go of its weights: the next teacher needs the room."""
        self._opened = None
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def requests(self, example: Example, split: str, hint: str = "", samples: int = 0) -> list[Request]:
        """One a sample; none of one that could not even be opened."""
        if self.dropped and not self._same_for_all:
            return []
        own, prompt = self._prompter.question(example, hint), self._prompter.render(example, hint)
        return [
            Request(
                fingerprint([self.know(), split, example.id, own, sample]),
                example,
                split,
                sample,
                prompt,
                bool(hint),
                self.voice.name,
            )
            for sample in range(samples or self.voice.samples)
        ]


class Asker:
    """Makes requests, of all speakers that have something to say."""

    def __init__(self, spec: RationaleSpec, speakers: Sequence[Speaker], task: Task):
        self.spec, self.speakers, self.task = spec, tuple(speakers), task

    def speakers_of(self, split: str) -> list[Speaker]:
        """The test split only scores: one that repeats gold labels is not asked there."""
        alone = len(self.speakers) == 1
        return [speaker for speaker in self.speakers if alone or split != "test" or speaker.voice.votes]

    def requests(self, example: Example, split: str) -> list[Request]:
        """The plain requests of one example, one a sample, speaker after speaker."""
        return [request for speaker in self.speakers_of(split) for request in speaker.requests(example, split)]

    def hinted(self, example: Example, split: str) -> list[Request]:
        """Those with the gold label in the prompt; none where it is not known, or hints are not asked for."""
        hints = self.spec.hint_retry
        if hints is None or example.label is None:
            return []
        hint = _hint(hints, self.task, example)
        return [
            request
            for speaker in self.speakers_of(split)
            for request in speaker.requests(example, split, hint, hints.samples)
        ]


def _hint(hints: HintSpec, task: Task, example: Example) -> str:
    answer = task.answer_sentence(example.label or "", example)
    return hinted(hints.template, bare_question(example.prompt), answer)


def needs_hint(answers: Sequence[Parsed], example: Example, task: Task) -> bool:
    """Whether no plain completion reached the gold label. One that is still missing may yet reach it."""
    gold = example.label
    return gold is not None and not any(a.label is not None and task.same(a.label, gold) for a in answers)


@dataclass(slots=True)
class Tally:
    """What the progress bar says of the completions of this run; of ``samples`` an example also how far they agree."""

    samples: int = 1
    completed: int = 0
    parsed: int = 0
    known: int = 0
    right: int = 0
    voted: int = 0
    agreement: float = 0.0
    waiting: dict[str, list[Parsed]] = field(default_factory=dict)

    def count(self, answer: Parsed, example: Example, task: Task) -> None:
        self.completed += 1
        self.parsed += answer.label is not None
        if example.label is not None:
            self.known += 1
            self.right += answer.label is not None and task.same(answer.label, example.label)
        if self.samples > 1:
            self._vote(answer, example, task)

    def _vote(self, answer: Parsed, example: Example, task: Task) -> None:
        """Votes where an example's samples are all there. One whose other samples came earlier, or never come, waits
        until there are too many such."""
        together = self.waiting.setdefault(example.id, [])
        together.append(answer)
        if len(together) == self.samples:
            del self.waiting[example.id]
            self.voted += 1
            self.agreement += vote(together, task.same)[1]
        elif len(self.waiting) > _WAITING_EXAMPLES:
            del self.waiting[next(iter(self.waiting))]

    def note(self) -> str:
        if not self.completed:
            return ""
        right = f", {self.right / self.known:.0%} right" if self.known else ""
        agreed = f", {self.agreement / self.voted:.0%} agreed" if self.voted else ""
        return f"{self.parsed / self.completed:.0%} parsed{right}{agreed}"


@dataclass(slots=True)
class Round:
    """One pass over the requests of a split, ``samples`` of each example: what came of it besides journal lines."""

    name: str
    total: int
    done: int
    samples: int = 1
    failures: dict[str, str] = field(default_factory=dict)
    closed: str = ""


def ask(
    waiting: Callable[[], Iterator[Request]],
    turn: Round,
    *,
    teacher: TextTeacher,
    task: Task,
    journal: Journal,
    ledger: Ledger,
    gate: Gate,
    progress: Progress,
) -> None:
    """Completes what ``waiting`` gives, again and again while the budget lets some of it through.

    ``waiting`` gives the requests that are in neither the journal nor ``turn.failures``, each time anew.
    """
    tally = Tally(turn.samples)

    def take(request: Request, result: Completion | Failure) -> None:
        if isinstance(result, Completion):  # first of all: from here on it cannot be lost
            journal.append(entry_of(request, result))
            tally.count(parse(result.text, task, request.example), request.example, task)
        else:
            turn.failures[request.key] = result.reason
        gate.settle(request, result)
        ledger.add(account(request.split, request.teacher), result)
        turn.done += 1
        progress.advance(turn.name, turn.done, turn.total, tally.note())

    progress.advance(turn.name, turn.done, turn.total)
    while turn.done < turn.total:
        before = turn.done
        results = teacher.complete(gate.admit(waiting()))
        try:
            for request, result in results:
                take(request, result)
        except KeyboardInterrupt:
            for request, result in _in_flight(results):
                take(request, result)
            raise
        turn.closed = gate.closed
        if turn.done == before:  # nothing went through: the budget is used up
            return


def _in_flight(
    results: Iterator[tuple[Request, Completion | Failure]],
) -> Iterator[tuple[Request, Completion | Failure]]:
    """What a teacher was asked before an interrupt that its caller got: it is handed on, and what is paid for comes."""
    hand_on = getattr(results, "throw", None)
    if hand_on is None:
        return
    try:
        yield hand_on(KeyboardInterrupt())
        yield from results
    except (KeyboardInterrupt, StopIteration):
        return


def entry_of(request: Request, completion: Completion) -> Entry:
    """The journal's line for a completion; fields that say nothing are left out."""
    scores = completion.scores
    return {
        "key": request.key,
        "split": request.split,
        "example": request.example.id,
        "sample": request.sample,
        **({"teacher": request.teacher} if request.teacher else {}),
        **({"hinted": True} if request.hinted else {}),
        "text": completion.text,
        "tokens_in": completion.tokens_in,
        "tokens_out": completion.tokens_out,
        **({"cut": True} if completion.cut else {}),
        **({"retries": completion.retries} if completion.retries else {}),
        **({"scores": _scores_entry(scores)} if scores is not None else {}),
    }


def completion_of(entry: Entry) -> Completion:
    scores = entry.get("scores")
    return Completion(
        entry["text"],
        entry["tokens_in"],
        entry["tokens_out"],
        entry.get("cut", False),
        entry.get("retries", 0),
        _scores_of(scores) if scores else None,
    )


def _scores_entry(scores: TokenScores) -> dict[str, Any]:
    return {
        "tokens": scores.tokens,
        "logprobs": [round(one, 6) for one in scores.logprobs],
        "top_tokens": scores.top_tokens,
        "top_logprobs": [[round(one, 6) for one in place] for place in scores.top_logprobs],
    }


def _scores_of(entry: dict[str, Any]) -> TokenScores:
    return TokenScores(
        tuple(entry["tokens"]),
        tuple(entry["logprobs"]),
        tuple(tuple(place) for place in entry["top_tokens"]),
        tuple(tuple(place) for place in entry["top_logprobs"]),
    )


def unanswered(requests: Iterable[Request], journal: Journal, failures: dict[str, str]) -> Iterator[Request]:
    """Those that are still to be asked."""
    return (request for request in requests if request.key not in journal and request.key not in failures)
