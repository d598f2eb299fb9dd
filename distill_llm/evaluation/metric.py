"""Accuracy of answers, per example and as a local ``evaluate`` module that anything speaking ``evaluate`` can use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distill_llm.core.answers import AnswerKind, same_answer
from distill_llm.core.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from evaluate import EvaluationModule

INPUTS_DESCRIPTION = """
Args:
    predictions: one answer per example; an empty one could not be read and counts as wrong.
    references: one gold label per example.
Returns:
    accuracy: share of predictions that are the same answer as their reference, 0 to 1.
"""


def load_metric(kind: AnswerKind) -> EvaluationModule:
    """The ``evaluate`` module that compares answers of this kind; ``compute`` gives ``{"accuracy": float}``.

    Reads the module from the package, never from the network. Importing ``evaluate`` takes seconds.
    """
    import evaluate

    return evaluate.load(str(metric_folder(kind)), keep_in_memory=True)


def metric_folder(kind: AnswerKind) -> Path:
    """The absolute folder that ``evaluate.load`` takes."""
    return Path(__file__).resolve().parent / "metrics" / metric_name(kind)


def metric_name(kind: AnswerKind) -> str:
    return f"{kind}_accuracy"


def correct(kind: AnswerKind, predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Whether each prediction is the same answer as its reference; an empty prediction never is."""
    if len(predictions) != len(references):
        raise DataError(
            f"{metric_name(kind)}: {len(predictions)} predictions came with {len(references)} references. Expected one "
            "prediction for each reference, in the same order; give an empty string where there is no answer."
        )
    return [
        bool(prediction.strip()) and same_answer(kind, prediction, reference)
        for prediction, reference in zip(predictions, references, strict=True)
    ]


def accuracy(kind: AnswerKind, predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of correct predictions, 0 to 1. Raises DataError where there is none to count."""
    right = correct(kind, predictions, references)
    if not right:
        raise DataError(f"{metric_name(kind)}: no predictions came. Expected at least one.")
    return sum(right) / len(right)
