"""A teacher without a model, and what it takes to ask it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill_llm.core.example import Example
from distill_llm.core.journal import Journal
from distill_llm.core.progress import SILENT, Progress
from distill_llm.rationales.generate import Asker, Round, Speaker, ask, unanswered
from distill_llm.rationales.ledger import Gate, Ledger, Spent
from distill_llm.rationales.prompts import make_prompter
from distill_llm.rationales.spec import RationaleSpec
from distill_llm.tasks.jsonl import Jsonl
from distill_llm.teachers.base import Completion, Failure, Request, Sampling

EXAMPLES = (
    Example(id="one", input="q1", prompt="Q: 1\nA:", label="2"),
    Example(id="two", input="q2", prompt="Q: 2\nA:", label="3"),
    Example(id="three", input="q3", prompt="Q: 3\nA:"),
)


def _text(request: Request) -> str:
    return f"Chain of {request.example.id}, {request.sample}. The answer is {request.sample}."


class StubTeacher:
    """Holds three requests at a time, answers the latest of them first, and may fail or be killed on the way."""

    def __init__(
        self,
        answer: Callable[[Request], str | Completion | Failure] = _text,
        *,
        dies_after: int | None = None,
        identity: str = "big@1",
    ):
        self.identity = identity
        self.asked: list[Request] = []
        self._answer, self._dies_after = answer, dies_after

    @property
    def keys(self) -> list[str]:
        return [request.key for request in self.asked]

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion | Failure]]:
        waiting: list[Request] = []
        for request in requests:
            waiting.append(request)
            if len(waiting) == 3:
                yield self._one(waiting.pop())
        while waiting:
            yield self._one(waiting.pop())

    def _one(self, request: Request) -> tuple[Request, Completion | Failure]:
        if len(self.asked) == self._dies_after:
            raise KeyboardInterrupt
        self.asked.append(request)
        answer = self._answer(request)
        return request, Completion(answer, tokens_in=5, tokens_out=7) if isinstance(answer, str) else answer


@pytest.fixture
def stub_teacher() -> type[StubTeacher]:
    return StubTeacher


@pytest.fixture
def examples() -> tuple[Example, ...]:
    """Two with a gold label, one without."""
    return EXAMPLES


@pytest.fixture
def task() -> Jsonl:
    return Jsonl.model_validate({"data": "nowhere.jsonl", "fields": {"input": ["q"]}})


@pytest.fixture
def asker(task: Jsonl) -> Callable[..., Asker]:
    """Makes an Asker: ``asker(teacher, seed=1, samples=3, prompt={...})``; two samples, warm, if not said."""

    def make(teacher: StubTeacher | None = None, *, seed: int = 17, **changes: Any) -> Asker:
        facts = {"teacher": {"kind": "gold"}, "samples": 2, "sampling": Sampling(temperature=0.7).model_dump()}
        spec = RationaleSpec.model_validate(facts | changes)
        (voice,) = spec.voices
        speaker = Speaker(voice, make_prompter(spec.prompt), task, seed, teacher or StubTeacher())
        return Asker(spec, [speaker], task)

    return make


@pytest.fixture
def answer_all(tmp_path: Path) -> Callable[..., tuple[Round, dict[str, Completion]]]:
    """Asks once for all plain requests of the examples that ``journal.jsonl`` does not hold; gives what it holds then,
    by key."""
    from distill_llm.rationales.generate import completion_of

    def complete(
        asker: Asker, examples: Iterable[Example] = EXAMPLES, *, progress: Progress = SILENT
    ) -> tuple[Round, dict[str, Completion]]:
        requests = [request for example in examples for request in asker.requests(example, "train")]
        ledger = Ledger(tmp_path / "ledger.json", {})
        ledger.start("train")
        with Journal(tmp_path / "journal.jsonl") as journal:
            turn = Round("rationales", len(requests), sum(request.key in journal for request in requests))
            ask(
                lambda: unanswered(requests, journal, turn.failures),
                turn,
                teacher=asker.speakers[0].teacher,
                task=asker.task,
                journal=journal,
                ledger=ledger,
                gate=Gate(asker.spec.budget, asker.spec.prices, Spent(), max_new_tokens=8),
                progress=progress,
            )
            found = {r.key: completion_of(journal.read(r.key)) for r in requests if r.key in journal}
        ledger.write("train")
        return turn, found

    return complete
