"""How well each class is recognised, of a task whose labels are classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from distill_llm.evaluation.text_tables import markdown_table, percent, terminal_table

if TYPE_CHECKING:
    from rich.table import Table


class ClassRecall(BaseModel):
    """Of the examples with one label, the share that each model answers correctly."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    label: str
    num_examples: int = Field(ge=1)
    left_out: bool = Field(description="the students saw no example of it in training")
    recall: dict[str, float]


def recall_of_classes(
    correct: Mapping[str, Sequence[bool]], labels: Sequence[str], left_out: Sequence[str]
) -> tuple[ClassRecall, ...]:
    """``correct``: of each model, for each example; ``labels``: the examples' own."""
    found = []
    for label in sorted(set(labels)):
        places = [place for place, gold in enumerate(labels) if gold == label]
        recall = {name: sum(right[i] for i in places) / len(places) for name, right in correct.items()}
        found.append(ClassRecall(label=label, num_examples=len(places), left_out=label in left_out, recall=recall))
    return tuple(found)


def class_table(classes: Sequence[ClassRecall]) -> Table:
    """In percent, for a terminal."""
    return terminal_table(_header(classes), map(_row, classes), numbers_from=1)


def class_markdown(classes: Sequence[ClassRecall]) -> str:
    return markdown_table(_header(classes), map(_row, classes), numbers_from=1)


def _header(classes: Sequence[ClassRecall]) -> list[str]:
    return ["recall %", "examples", *classes[0].recall]


def _row(one: ClassRecall) -> list[str]:
    name = f"{one.label} (left out)" if one.left_out else one.label
    return [name, f"{one.num_examples:,}", *(percent(share) for share in one.recall.values())]
