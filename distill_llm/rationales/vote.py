"""Self-consistency: the label that most completions of one example reach (Wang et al. 2022, arXiv:2203.11171)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill_llm.rationales.parse import Parsed


def vote(answers: Sequence[Parsed], same: Callable[[str, str], bool]) -> tuple[str | None, float]:
    """The majority label and its share of all completions, unparsable ones included. The earliest wins a tie."""
    groups: list[tuple[str, int]] = []
    for answer in answers:
        if answer.label is None:
            continue
        for index, (label, votes) in enumerate(groups):
            if same(label, answer.label):
                groups[index] = (label, votes + 1)
                break
        else:
            groups.append((answer.label, 1))
    if not groups:
        return None, 0.0
    label, votes = max(groups, key=lambda group: group[1])
    return label, votes / len(answers)
