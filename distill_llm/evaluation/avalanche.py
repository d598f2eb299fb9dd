"""The error avalanche of a chain: which wrong answers a student inherits, and what is lost on the way down to it.

Pure functions over answers that are there already: right or wrong, the same examples in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from distill_llm.evaluation.text_tables import markdown_table, percent, terminal_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table


class Link(BaseModel):
    """One model of the chain. ``lost`` and ``gained`` are None at the top, and for a mean of models beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    wrong: int = Field(ge=0, description="of all examples")
    inherited: int = Field(ge=0, description="of the student's wrong answers, those that this model got wrong too")
    lost: int | None = Field(ge=0, description="right in the model above, wrong here")
    gained: int | None = Field(ge=0, description="wrong in the model above, right here")


class Avalanche(BaseModel):
    """``links`` go from the top down to the student; ``own`` are its wrong answers that no model above it gave."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_examples: int = Field(ge=1)
    links: tuple[Link, ...] = Field(min_length=2)
    own: int = Field(ge=0)

    @property
    def student(self) -> Link:
        return self.links[-1]


def measure_avalanche(
    chain: Sequence[tuple[str, Sequence[bool]]], beside: Sequence[tuple[str, Sequence[bool]]] = ()
) -> Avalanche:
    """Of the answers of each model from the top down, the student's last; ``beside``: of means of models above it."""
    *above, (student, answers) = chain
    wrong = [not right for right in answers]
    links = []
    before: Sequence[bool] | None = None
    for name, right in chain:
        links.append(_link(name, right, wrong, before))
        before = right
    means = [_link(name, right, wrong, None) for name, right in beside]
    own = sum(missed and all(right[number] for _, right in (*above, *beside)) for number, missed in enumerate(wrong))
    assert links[-1].name == student
    return Avalanche(num_examples=len(answers), links=(*links[:-1], *means, links[-1]), own=own)


def to_avalanche_table(avalanche: Avalanche) -> Table:
    """For a terminal of 80 columns or more; the student in bold."""
    return terminal_table(_header(avalanche), _rows(avalanche), numbers_from=1, bold=avalanche.student.name)


def to_avalanche_markdown(avalanche: Avalanche) -> str:
    table = markdown_table(_header(avalanche), _rows(avalanche), numbers_from=1, bold=avalanche.student.name)
    return f"{table}\n\n{in_words(avalanche)}"


def in_words(avalanche: Avalanche) -> str:
    """What the table has no row for."""
    student = avalanche.student
    if not student.wrong:
        return f"'{student.name}' has no wrong answer."
    return (
        f"Of the {student.wrong:,} wrong answers of '{student.name}', {avalanche.own:,} "
        f"({percent(avalanche.own / student.wrong)}%) were right in every model above it."
    )


def _link(name: str, right: Sequence[bool], wrong_in_student: Sequence[bool], above: Sequence[bool] | None) -> Link:
    return Link(
        name=name,
        wrong=sum(not one for one in right),
        inherited=sum(missed and not one for missed, one in zip(wrong_in_student, right, strict=True)),
        lost=None if above is None else sum(had and not has for had, has in zip(above, right, strict=True)),
        gained=None if above is None else sum(has and not had for had, has in zip(above, right, strict=True)),
    )


def _header(avalanche: Avalanche) -> list[str]:
    return ["error avalanche", "wrong", f"of {avalanche.student.wrong:,} wrong\nin student", "lost", "gained"]


def _rows(avalanche: Avalanche) -> list[list[str]]:
    rows = []
    for link in avalanche.links:
        share = f" ({percent(link.inherited / avalanche.student.wrong)}%)" if avalanche.student.wrong else ""
        inherited = "-" if link is avalanche.student else f"{link.inherited:,}{share}"
        changes = ["-" if number is None else f"{number:,}" for number in (link.lost, link.gained)]
        rows.append([link.name, f"{link.wrong:,}", inherited, *changes])
    return rows
