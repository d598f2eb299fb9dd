"""Answers of a student, on examples that it did not learn from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill_llm.evaluation.joint import JointGenerator
from distill_llm.models.generate import Generator
from distill_llm.rationales.parse import parse

if TYPE_CHECKING:
    from distill_llm.core.example import Example, Target
    from distill_llm.core.progress import Progress
    from distill_llm.data.view import StudentView
    from distill_llm.evaluation.joint import Mix
    from distill_llm.tasks.base import Task


@dataclass(frozen=True, slots=True)
class Prediction:
    """``label`` is "" where the text states none; ``correct`` is None where the gold label is unknown."""

    example_id: str
    text: str
    label: str
    correct: bool | None


@dataclass(frozen=True, slots=True)
class Predictions:
    """In the order of the examples. ``seconds`` is the time of generation alone."""

    items: tuple[Prediction, ...]
    seconds: float


def read_label(text: str, target: Target, task: Task, example: Example) -> str:
    """The label that a student's text states."""
    label = task.normalise(text, example) if target == "label" else parse(text, task, example).label
    return label or ""


def predict(
    model: Any,
    view: StudentView,
    examples: Sequence[Example],
    *,
    task: Task,
    target: Target,
    batch_rows: int,
    max_new_tokens: int,
    progress: Progress,
    name: str,
    mix: Mix | None = None,
) -> Predictions:
    """Greedy answers, in batches of about one length. With ``mix``, ``model`` is several, which answer as one."""
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "decoder_prefix": view.decoder_prefix(target)}
    generator: Any = (
        Generator(model, view.tokenizer, **options)
        if mix is None
        else JointGenerator(model, view.tokenizer, mix, **options)
    )
    settings: dict[str, Any] = {"batch_rows": batch_rows, "progress": progress, "name": name}
    return predict_with(generator, view, examples, task=task, target=target, **settings)


def predict_with(
    generator: Any,
    view: StudentView,
    examples: Sequence[Example],
    *,
    task: Task,
    target: Target,
    batch_rows: int,
    progress: Progress,
    name: str,
) -> Predictions:
    """The same of whatever writes texts for token ids (``write_ids``), or for pixels (``write_pictures``)."""
    asked = questions(view, examples, target)
    order = sorted(range(len(asked)), key=lambda i: -len(asked[i]) if view.painter is None else 0)
    texts = [""] * len(examples)
    seconds = 0.0
    for start in range(0, len(order), batch_rows):
        part = order[start : start + batch_rows]
        began = time.perf_counter()
        written = ask(generator, view, [asked[i] for i in part])
        seconds += time.perf_counter() - began
        for i, text in zip(part, written, strict=True):
            texts[i] = text
        progress.advance(name, min(start + batch_rows, len(order)), len(order))
    return Predictions(
        tuple(_judge(text, target, task, example) for text, example in zip(texts, examples, strict=True)), seconds
    )


def questions(view: StudentView, examples: Sequence[Example], target: Target) -> list[Any]:
    """Of each example the token ids that a student reads, or its picture."""
    pictures, _ = view.pictures(examples, target)
    return pictures or view.inputs([example.input for example in examples], target)[0]


def ask(generator: Any, view: StudentView, asked: Sequence[Any]) -> list[str]:
    """One batch of texts for what ``questions`` gave."""
    if view.painter is not None:
        return [one.text for one in generator.write_pictures(view.painter.pixels(asked))]
    return [one.text for one in generator.write_ids(asked)]


def _judge(text: str, target: Target, task: Task, example: Example) -> Prediction:
    label = read_label(text, target, task, example)
    correct = None if example.label is None else bool(label) and task.same(label, example.label)
    return Prediction(example.id, text, label, correct)
