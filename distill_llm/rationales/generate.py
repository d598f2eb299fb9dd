"""Asking a teacher: requests that are not in the journal are completed, and journaled before anything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill_llm.core.files import Journal, fingerprint
from distill_llm.teachers.base import Completion, Request, TextTeacher

if TYPE_CHECKING:
    from distill_llm.core.example import Example
    from distill_llm.core.progress import Progress
    from distill_llm.rationales.prompts import Prompter
    from distill_llm.rationales.spec import RationaleSpec


def make_requests(
    examples: Sequence[Example], split: str, spec: RationaleSpec, prompter: Prompter, identity: str, seed: int = 0
) -> list[Request]:
    """One request per example and sample. Its key changes with all that decides the completion."""
    sampling = spec.sampling.model_dump(mode="json")
    drawn = seed if spec.sampling.temperature > 0 else 0  # greedy text does not depend on the seed
    requests = []
    for example in examples:
        prompt = prompter.render(example)
        for sample in range(spec.samples):
            key = fingerprint([identity, sampling, drawn, split, example.id, prompt, sample])
            requests.append(Request(key, example, split, sample, prompt))
    return requests


def complete(
    requests: Sequence[Request], teacher: TextTeacher, journal: Journal, progress: Progress, name: str
) -> dict[str, Completion]:
    """Completions by key. What the journal holds is not asked again, so a killed run goes on where it was."""
    waiting = [request for request in requests if request.key not in journal.entries]
    done = len(requests) - len(waiting)
    progress.advance(name, done, len(requests))
    if waiting:
        for request, completion in teacher.complete(waiting):
            journal.append(
                {
                    "key": request.key,
                    "split": request.split,
                    "example": request.example.id,
                    "sample": request.sample,
                    "text": completion.text,
                    "tokens_in": completion.tokens_in,
                    "tokens_out": completion.tokens_out,
                }
            )
            done += 1
            progress.advance(name, done, len(requests))
    return {request.key: _from_journal(journal, request.key) for request in requests}


def _from_journal(journal: Journal, key: str) -> Completion:
    entry = journal.entries[key]
    return Completion(entry["text"], entry["tokens_in"], entry["tokens_out"])
