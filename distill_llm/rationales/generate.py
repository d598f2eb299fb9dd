"""Asking a teacher: requests that are not in the journal are completed, and journaled before anything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distill_llm.core.files import fingerprint
from distill_llm.rationales.parse import Parsed, parse
from distill_llm.rationales.prompts import hinted
from distill_llm.tasks.wording import bare_question
from distill_llm.teachers.base import Completion, Failure, Request, TextTeacher, TokenScores

if TYPE_CHECKING:
    from distill_llm.core.example import Example
    from distill_llm.core.journal import Entry, Journal
    from distill_llm.core.progress import Progress
    from distill_llm.rationales.ledger import Gate, Ledger
    from distill_llm.rationales.prompts import HintSpec, Prompter
    from distill_llm.rationales.spec import RationaleSpec
    from distill_llm.tasks.base import Task


class Asker:
    """Makes requests. A key changes with all that decides the completion, and with nothing else."""

    def __init__(self, spec: RationaleSpec, prompter: Prompter, teacher: TextTeacher, task: Task, seed: int):
        self.spec, self.teacher, self.task = spec, teacher, task
        self._prompter = prompter
        sampling = spec.sampling.model_dump(mode="json")
        drawn = seed if spec.sampling.temperature > 0 else 0  # greedy text does not depend on the seed
        self._same_for_all = fingerprint([teacher.identity, sampling, drawn, prompter.fingerprint])

    def requests(self, example: Example, split: str) -> list[Request]:
        """The plain requests of one example, one a sample."""
        return self._made(example, split, "", self.spec.samples)

    def hinted(self, example: Example, split: str) -> list[Request]:
        """Those with the gold label in the prompt; none where it is not known, or hints are not asked for."""
        hints = self.spec.hint_retry
        if hints is None or example.label is None:
            return []
        return self._made(example, split, _hint(hints, self.task, example), hints.samples)

    def _made(self, example: Example, split: str, hint: str, samples: int) -> list[Request]:
        own, prompt = self._prompter.question(example, hint), self._prompter.render(example, hint)
        return [
            Request(
                fingerprint([self._same_for_all, split, example.id, own, sample]),
                example,
                split,
                sample,
                prompt,
                bool(hint),
            )
            for sample in range(samples)
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
    """What the progress bar says of the completions of this run."""

    completed: int = 0
    parsed: int = 0
    known: int = 0
    right: int = 0

    def count(self, answer: Parsed, example: Example, task: Task) -> None:
        self.completed += 1
        self.parsed += answer.label is not None
        if example.label is not None:
            self.known += 1
            self.right += answer.label is not None and task.same(answer.label, example.label)

    def note(self) -> str:
        if not self.completed:
            return ""
        right = f", {self.right / self.known:.0%} right" if self.known else ""
        return f"{self.parsed / self.completed:.0%} parsed{right}"


@dataclass(slots=True)
class Round:
    """One pass over the requests of a split: what came of it besides the journal's lines."""

    name: str
    total: int
    done: int
    failures: dict[str, str] = field(default_factory=dict)
    closed: str = ""


def ask(
    waiting: Callable[[], Iterator[Request]],
    turn: Round,
    *,
    asker: Asker,
    journal: Journal,
    ledger: Ledger,
    gate: Gate,
    progress: Progress,
) -> None:
    """Completes what ``waiting`` gives, again and again while the budget lets some of it through.

    ``waiting`` gives the requests that are in neither the journal nor ``turn.failures``, each time anew.
    """
    tally = Tally()

    def take(request: Request, result: Completion | Failure) -> None:
        if isinstance(result, Completion):  # first of all: from here on it cannot be lost
            journal.append(entry_of(request, result))
            tally.count(parse(result.text, asker.task, request.example), request.example, asker.task)
        else:
            turn.failures[request.key] = result.reason
        gate.settle(request, result)
        ledger.add(request.split, result)
        turn.done += 1
        progress.advance(turn.name, turn.done, turn.total, tally.note())

    progress.advance(turn.name, turn.done, turn.total)
    while turn.done < turn.total:
        before = turn.done
        results = asker.teacher.complete(gate.admit(waiting()))
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
