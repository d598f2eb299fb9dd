"""A teacher without a model, behind a kind that every recipe may name, and a small task on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.base import Completion, Failure, Prompt, Request, Sampling
from distill_llm.teachers.gold import Gold

YAML = """
name: tiny
task: {kind: jsonl, data: DATA, fields: {id: id, input: question}, limits: {test: 4}}
rationales: {teacher: {kind: gold}, sampling: {max_new_tokens: 20}}
student:
  config: {model_type: t5, d_model: 8, d_kv: 4, d_ff: 16, num_layers: 1, num_heads: 2}
  tokenizer: {kind: words, vocab_size: 128}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}
train: {max_steps: 2, rows_per_step: 8, rows_per_batch: 8}
"""
Answer = Callable[[Request], str | Completion | Failure]
SIZES = {"train": 12, "validation": 4, "test": 4}


def _right(request: Request) -> str:
    """Right in all plain answers, and 7 tokens for 5 in the prompt."""
    number = int(request.example.id.rsplit("-", 1)[1])
    return f"{number} is {number // 2} twice . The answer is {'no' if number % 2 else 'yes'}."


class StubTeacher:
    """Keeps four requests under way, as a server would, and remembers what it is asked."""

    identity = "stub"

    def __init__(self, answer: Answer):
        self.asked: list[Request] = []
        self.checked = 0
        self._answer = answer

    @property
    def keys(self) -> list[str]:
        return [request.key for request in self.asked]

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion | Failure]]:
        waiting: list[Request] = []
        for request in requests:
            waiting.append(request)
            if len(waiting) == 4:
                yield self._one(waiting.pop(0))
        while waiting:
            yield self._one(waiting.pop(0))

    def _one(self, request: Request) -> tuple[Request, Completion | Failure]:
        self.asked.append(request)
        answer = self._answer(request)
        return request, Completion(answer, tokens_in=5, tokens_out=7) if isinstance(answer, str) else answer


@pytest.fixture
def teach(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StubTeacher]:
    """Puts a stub in the place of kind gold: ``teach(answer, max_prompt_tokens=9)``; a token is then a word."""

    def put(answer: Answer = _right, *, max_prompt_tokens: int | None = None) -> StubTeacher:
        stub = StubTeacher(answer)

        def check(self: Gold, *, chat: bool, sampling: Sampling) -> None:
            stub.checked += 1

        def count(self: Gold, prompts: Sequence[Prompt]) -> list[int] | None:
            return None if max_prompt_tokens is None else [len(str(prompt).split()) for prompt in prompts]

        monkeypatch.setattr(Gold, "knows_answers", False)
        monkeypatch.setattr(Gold, "open", lambda self, **_: stub)
        monkeypatch.setattr(Gold, "check", check)
        monkeypatch.setattr(Gold, "count_tokens", count)
        monkeypatch.setattr(Gold, "max_prompt_tokens", lambda self, sampling: max_prompt_tokens)
        return stub

    return put


@pytest.fixture
def even(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe that asks which numbers are even: ``even("seed=1", unlabelled=("train",), run="other")``."""

    def build(*overrides: str, unlabelled: Sequence[str] = (), run: str = "run", **sizes: int) -> Recipe:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        first = 0
        for split, size in (SIZES | sizes).items():
            rows: list[dict[str, Any]] = [
                {"id": f"{split}-{n}", "question": f"is {n} even ?"} for n in range(first, first + size)
            ]
            for number, row in enumerate(rows, start=first):
                row["label"] = None if split in unlabelled else ("no" if number % 2 else "yes")
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            first += size
        text = YAML.replace("DATA", str(folder))
        return recipe_from(parse_yaml(text, "tiny"), [f"run_dir={tmp_path / run}", *overrides])

    return build


class Sayings:
    """A progress that remembers what is said, and where each bar ended."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.bars: dict[str, tuple[float, float]] = {}

    def advance(self, name: str, done: float, total: float, note: str = "") -> None:
        self.bars[name] = (done, total)

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture
def sayings() -> Sayings:
    return Sayings()
