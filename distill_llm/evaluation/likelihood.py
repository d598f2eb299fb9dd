"""Answers by likelihood: of a closed set of labels, the one whose text the student holds likeliest.

B rows (one a label of an example), T positions, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import ConfigError, DataError
from distill_llm.evaluation.predict import Prediction, Predictions

if TYPE_CHECKING:
    from distill_llm.core.example import Example
    from distill_llm.core.progress import Progress
    from distill_llm.data.rows import Row
    from distill_llm.data.view import StudentView
    from distill_llm.tasks.base import Task

Scores = Mapping[str, float]
Bias = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class LabelScores:
    """For each example the log-likelihood of each of its labels, in nats. ``seconds``: of the forward passes."""

    examples: tuple[Example, ...]
    scores: tuple[Scores, ...]
    seconds: float

    def predictions(self, task: Task, bias: Bias | None = None) -> Predictions:
        """The likeliest labels after ``bias`` is added to the log-likelihoods of those that it names; the earlier of
        two that are as likely."""
        items = []
        for example, scores in zip(self.examples, self.scores, strict=True):
            label = best(scores, bias or {})
            correct = None if example.label is None else task.same(label, example.label)
            items.append(Prediction(example.id, label, label, correct))
        return Predictions(tuple(items), self.seconds)


def best(scores: Scores, bias: Bias) -> str:
    return max(scores, key=lambda label: scores[label] + bias.get(label, 0.0))


def check_closed(examples: Sequence[Example], split: str, biased: Sequence[str] = ()) -> None:
    """Raises DataError where an example has no choices, ConfigError where no example has a label of ``biased``."""
    for example in examples:
        if len(set(example.choices)) < 2:
            raise DataError(
                f"evaluate.by: likelihood chooses among an example's labels, but example '{example.id}' ({split}) has "
                f"{len(set(example.choices))}. Use by: generation, or a task with choices."
            )
    known = {choice for example in examples for choice in example.choices}
    unknown = [label for label in biased if label not in known]
    if unknown:
        raise ConfigError(
            f"evaluate.label_bias.{unknown[0]}: no example of the {split} split has this label; they have "
            f"{sorted(known)[:12]}."
        )


def score_labels(
    model: Any,
    view: StudentView,
    examples: Sequence[Example],
    *,
    batch_rows: int,
    progress: Progress,
    name: str,
) -> LabelScores:
    """How likely the student writes each label of each example, the end of the text included."""
    import torch

    from distill_llm.data.collate import Collator

    start = model.config.decoder_start_token_id if view.is_encoder_decoder else None
    pad = view.tokenizer.pad_token_id if view.tokenizer.pad_token_id is not None else 0
    collate = Collator(pad, start, painter=view.painter)
    rows = _rows(view, examples)
    order = sorted(range(len(rows)), key=lambda index: -rows[index].num_tokens)
    found, seconds, was_training = [0.0] * len(rows), 0.0, model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_rows):
            part = order[first : first + batch_rows]
            batch = {key: column.to(model.device) for key, column in collate([rows[i] for i in part]).items()}
            began = time.perf_counter()
            with torch.inference_mode():
                likelihoods = log_likelihoods(model, batch).tolist()
            seconds += time.perf_counter() - began
            for index, one in zip(part, likelihoods, strict=True):
                found[index] = one
            progress.advance(name, min(first + batch_rows, len(order)), len(order))
    finally:
        model.train(was_training)
    scores = iter(found)
    each = tuple({label: next(scores) for label in dict.fromkeys(example.choices)} for example in examples)
    return LabelScores(tuple(examples), each, seconds)


def log_likelihoods(model: Any, batch: Any) -> Any:
    """Of each row's supervised tokens, summed: [B], float32."""
    from distill_llm.core.signals import IGNORE_INDEX, aligned_labels, model_inputs

    labels = aligned_labels(batch)
    logits = model(**model_inputs(batch), use_cache=False).logits[:, : labels.size(1)].float()
    there = labels != IGNORE_INDEX
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return chosen.where(there, chosen.new_zeros(())).sum(-1)


def _rows(view: StudentView, examples: Sequence[Example]) -> list[Row]:
    from distill_llm.data.rows import Row

    pictures, _ = view.pictures(examples, "label")
    inputs, _ = view.inputs([] if pictures else [example.input for example in examples], "label")
    read = [((), picture) for picture in pictures] or [(ids, None) for ids in inputs]
    names = sorted({choice for example in examples for choice in example.choices})
    ids, _ = view.targets(names)
    texts = {name: tuple(one) for name, one in zip(names, ids, strict=True)}
    _refuse_twins(examples, texts)
    prefix = tuple(view.decoder_prefix("label"))
    return [
        Row(number, "label", own, texts[label], 1.0, prefix, picture=picture)
        for number, (example, (own, picture)) in enumerate(zip(examples, read, strict=True))
        for label in dict.fromkeys(example.choices)
    ]


def _refuse_twins(examples: Sequence[Example], texts: Mapping[str, tuple[int, ...]]) -> None:
    for example in examples:
        seen: dict[tuple[int, ...], str] = {}
        for label in dict.fromkeys(example.choices):
            twin = seen.setdefault(texts[label], label)
            if twin != label:
                raise ConfigError(
                    f"evaluate.by: likelihood cannot tell the labels {twin!r} and {label!r} apart: to the student's "
                    "tokenizer they are the same tokens. It may never have seen the words (student.tokenizer: take the "
                    "teacher's), or cut them (train.max_target_tokens)."
                )


def fit_bias(scores: Sequence[Scores], gold: Sequence[str], labels: Sequence[str], fixed: Bias) -> dict[str, float]:
    """Offsets for ``labels`` with which most of the examples are answered by their ``gold`` labels, beside ``fixed``.

    First one offset for all of them, then each in turn, as long as more come out right: every step is exact, the
    middle of the best interval nearest to 0, or 0 where that is as good.
    """
    bias = dict(fixed) | dict.fromkeys(labels, 0.0)
    groups = [list(labels), *([label] for label in labels)] if len(labels) > 1 else [list(labels)]
    right = _right(scores, gold, bias)
    gains = True
    while gains:
        gains = False
        for group in groups:
            shift = _best_shift(scores, gold, bias, group)
            moved = bias | {label: bias[label] + shift for label in group}
            if (now := _right(scores, gold, moved)) > right:
                bias, right, gains = moved, now, True
    return {label: bias[label] for label in labels}


def _right(scores: Sequence[Scores], gold: Sequence[str], bias: Bias) -> int:
    return sum(best(one, bias) == label for one, label in zip(scores, gold, strict=True))


def _best_shift(scores: Sequence[Scores], gold: Sequence[str], bias: Bias, group: Sequence[str]) -> float:
    """What to add to the offsets of ``group``: below an example's margin another label wins, above it one of these."""
    changes: list[tuple[float, int]] = []
    right = 0
    for one, label in zip(scores, gold, strict=True):
        raised = {name: score + bias.get(name, 0.0) for name, score in one.items()}
        mine = {name: score for name, score in raised.items() if name in group}
        others = {name: score for name, score in raised.items() if name not in group}
        before = bool(others) and max(others, key=others.__getitem__) == label
        after = bool(mine) and max(mine, key=mine.__getitem__) == label
        right += before if others else after
        if mine and others and before != after:
            changes.append((max(others.values()) - max(mine.values()), int(after) - int(before)))
    return max(_plateaus(right, sorted(changes)), key=lambda plateau: (plateau[0], -abs(plateau[1])))[1]


def _plateaus(right: int, changes: Sequence[tuple[float, int]]) -> Iterator[tuple[int, float]]:
    """How many are right between two margins, and the shift there: 0 where it lies between them, else the middle."""
    borders = [-math.inf, *(margin for margin, _ in changes), math.inf]
    for number, (low, high) in enumerate(pairwise(borders)):
        if number:
            right += changes[number - 1][1]
        if low >= high:
            continue
        if low < 0 < high:
            yield right, 0.0
        elif math.isinf(low):
            yield right, high - 1.0
        else:
            yield right, low + 1.0 if math.isinf(high) else (low + high) / 2
