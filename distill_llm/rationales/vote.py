"""Self-consistency: the label that most completions of one example reach (Wang et al. 2022, arXiv:2203.11171)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol


class Answer(Protocol):
    """What states a label, or None."""

    @property
    def label(self) -> str | None: ...


def vote(
    answers: Sequence[Answer], same: Callable[[str, str], bool], weights: Sequence[Fraction] = ()
) -> tuple[str | None, float]:
    """The majority label and its share of all completions, unparsable ones included. The earliest wins a tie.

    ``weights``: what each completion's vote weighs, and so its share; empty: all alike.
    """
    each: Sequence[int | Fraction] = weights or [1] * len(answers)
    groups: list[tuple[str, int | Fraction]] = []
    for answer, weight in zip(answers, each, strict=True):
        if answer.label is None or not weight:
            continue
        for index, (label, votes) in enumerate(groups):
            if same(label, answer.label):
                groups[index] = (label, votes + weight)
                break
        else:
            groups.append((answer.label, weight))
    total = sum(each)
    if not groups or not total:
        return None, 0.0
    label, votes = max(groups, key=lambda group: group[1])
    return label, float(votes / total)
