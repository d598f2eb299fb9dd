"""Anyone's own data: rows of a file, a folder or a Hub data set, with the columns named in the recipe."""

from __future__ import annotations

import re
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from distill_llm.core.answers import AnswerKind, equation_value, number_text, parse_number
from distill_llm.core.component import Component
from distill_llm.core.errors import DataError
from distill_llm.core.example import Example
from distill_llm.tasks.base import SplitName, Task, chosen
from distill_llm.tasks.source import USUAL_STEMS, Layout, Row, read_splits
from distill_llm.tasks.wording import STATED_ANSWER, few_shot, lettered_answer, with_choices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MAX_CHOICES = 26


class Fields(Component):
    """Which column holds what. ``input`` may be several columns, one line each; None: the data has no such column.
    ``picture``: an image, or the path of an image file, seen from the folder of the data's file.
    """

    input: tuple[str, ...] = ()
    label: str | None = "label"
    id: str | None = None
    rationale: str | None = None
    choices: str | None = None
    picture: str | None = None

    @field_validator("input", mode="before", json_schema_input_type=str | tuple[str, ...])
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class HubSplits(Component):
    """What the splits are called on the Hub; one that the data set does not have is cut from ``train``."""

    train: str = "train"
    validation: str = "validation"
    test: str = "test"


class Jsonl(Task):
    """Rows of your own: JSON, JSON lines, CSV or Parquet.

    The input is ``fields.input`` or, for words of your own around the columns, ``template``. Choices of each row
    (``fields.choices``) are shown with letters; ``choices`` that are the same for all rows are not shown.
    """

    kind: Literal["jsonl"] = "jsonl"
    title: ClassVar[str] = "your own data"
    licence: ClassVar[str] = "as your data"

    data: str = Field(min_length=1, description="a file, a folder with train.jsonl and perhaps test.jsonl, or a Hub id")
    test_data: str | None = Field(default=None, description="a source for the test split, before that of `data`")
    validation_data: str | None = Field(default=None, description="the same for the validation split")
    hub_config: str | None = None
    hub_splits: HubSplits = HubSplits()
    fields: Fields = Fields()
    template: str | None = Field(default=None, description='such as "{premise} {hypothesis}"')
    choices: tuple[str, ...] = Field(default=(), description="the labels, where they are the same for all rows")
    pattern: str | None = Field(
        default=None, description="regular expression: where the label stands in a completion, as its one group"
    )
    metric: Literal["text", "number", "equation"] = "text"

    @field_validator("pattern")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression ({error}): correct it") from error
        if groups != 1:
            raise ValueError(
                f"{pattern!r} has {groups} groups, expected one, around the label: write others as (?:...)"
            )
        return pattern

    @field_validator("template")
    @classmethod
    def _plain_names(cls, template: str | None) -> str | None:
        if template is not None and not _names(template):
            raise ValueError(f'{template!r} names no column: expected at least one, such as "{{question}}"')
        return template

    @model_validator(mode="after")
    def _consistent(self) -> Jsonl:
        if bool(self.fields.input) == (self.template is not None):
            raise ValueError(
                "the input must come from one of `fields.input` (a column) and `template`: give one of them"
            )
        if self.choices and self.fields.choices:
            raise ValueError("give one of `choices` (the same for all rows) and `fields.choices` (a column)")
        if len(set(self.choices)) != len(self.choices):
            raise ValueError(f"`choices` {list(self.choices)} holds one twice: remove it")
        return self

    def answer_kind(self) -> AnswerKind:
        return self.metric

    def read(self) -> Mapping[SplitName, Sequence[Example]]:
        hub: dict[SplitName, str] = {
            "train": self.hub_splits.train,
            "validation": self.hub_splits.validation,
            "test": self.hub_splits.test,
        }
        found = read_splits(self.data, Layout(USUAL_STEMS, hub, self.hub_config))
        others: tuple[tuple[SplitName, str | None], ...] = (
            ("validation", self.validation_data),
            ("test", self.test_data),
        )
        for split, data in others:
            if data is not None:
                layout = Layout({"train": USUAL_STEMS[split]}, {"train": hub[split]}, self.hub_config)
                found[split] = read_splits(data, layout)["train"]
        self._check_columns(found)
        return {split: [self._example(row, split) for row in rows] for split, rows in found.items()}

    def answer_sentence(self, label: str, example: Example) -> str:
        return lettered_answer(label, example.choices) if self.fields.choices else f"The answer is {label}."

    def answer_pattern(self) -> str:
        return self.pattern or STATED_ANSWER

    def normalise(self, text: str, example: Example) -> str | None:
        if example.choices:
            return chosen(text, example.choices)
        if self.metric == "number":
            value = parse_number(text)
            return None if value is None else number_text(value)
        if self.metric == "equation" and equation_value(text) is None:
            return None
        return text.strip().rstrip(".").strip() or None

    def _check_columns(self, found: Mapping[SplitName, Sequence[Row]]) -> None:
        """A label or rationale may be missing in a row, but a column that no row has is a slip of the pen."""
        there = {name for rows in found.values() for row in rows for name in row}
        for key in ("label", "rationale"):
            name = getattr(self.fields, key)
            if name is not None and name not in there:
                raise DataError(
                    f"task jsonl, data '{self.data}': no row has the field '{name}' that `fields.{key}` names; there "
                    f"are {sorted(there)}. Name one of them, or null where the data has none."
                )

    def _example(self, row: Row, split: SplitName) -> Example:
        choices = row.texts(self.fields.choices) if self.fields.choices else self.choices
        if self.fields.choices and len(choices) > _MAX_CHOICES:
            raise DataError(
                f"{row.where}, row {row.number}: {len(choices)} choices. Expected at most {_MAX_CHOICES}, one a letter."
            )
        question = self._question(row)
        if self.fields.choices:
            question = with_choices(question, choices)
        label = row.optional(self.fields.label) if self.fields.label else None
        if label is not None:
            label = (chosen(label, choices) or label.strip()) if choices else label.strip()
        return Example(
            id=row.text(self.fields.id) if self.fields.id else f"{split}-{row.number}",
            input=question,
            prompt=few_shot(question),
            label=label,
            rationale=row.optional(self.fields.rationale) if self.fields.rationale else None,
            choices=choices,
            picture=self._picture(row),
        )

    def _picture(self, row: Row) -> str | bytes:
        if self.fields.picture is None:
            return ""
        image = row.image(self.fields.picture)
        if isinstance(image, bytes) or image.startswith("/"):
            return image
        file = Path(row.where)  # of a file, its path
        return str(file.parent / image) if file.is_file() else image

    def _question(self, row: Row) -> str:
        if self.template is None:
            return "\n".join(row.text(name).strip() for name in self.fields.input)
        return self.template.format(**{name: row.text(name).strip() for name in _names(self.template)})


def _names(template: str) -> list[str]:
    """The columns that a template names; only plain ``{name}`` is allowed."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"{template!r} is no template ({error}): write a brace that is text twice, {{{{ or }}}}"
        ) from error
    for _, name, form, conversion in parts:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise ValueError(f'{template!r}: {name!r} is not a plain column name, expected such as "{{question}}"')
    return [name for _, name, _, _ in parts if name is not None]
