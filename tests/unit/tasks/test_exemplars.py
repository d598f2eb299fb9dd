"""The few-shot exemplars read back through their task, and none of them is a row of the data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from distill_llm.core.answers import equation_value, normalise_text, parse_number
from distill_llm.core.assets import asset_root
from distill_llm.core.component import kinds
from distill_llm.core.example import Example
from distill_llm.tasks.base import Task

if TYPE_CHECKING:
    from collections.abc import Mapping

SHARED = Path(__file__).parents[3].parent / "shared"
FOLDERS = {"cqa": "dss/cqa", "svamp": "dss/svamp", "gsm8k": "gsm8k", "strategyqa": "strategyqa"}
KINDS = ("anli", "cqa", "esnli", "gsm8k", "strategyqa", "svamp")


def exemplars(kind: str) -> list[Mapping[str, str]]:
    return yaml.safe_load((asset_root() / "data" / "exemplars" / f"{kind}.yaml").read_text(encoding="utf-8"))


def make(kind: str, **settings: str) -> Task:
    return kinds(Task, "distill_llm.tasks")[kind].model_validate(settings)


@pytest.mark.parametrize("kind", KINDS)
def test_file_is_well_formed(kind: str) -> None:
    text = (asset_root() / "data" / "exemplars" / f"{kind}.yaml").read_text(encoding="utf-8")
    assert "Licence: Apache-2.0" in text.split("\n")[1]
    assert "Written for this project" in text.split("\n")[1]
    rows = exemplars(kind)
    assert 8 <= len(rows) <= 10
    assert len({row["question"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"question", "rationale", "answer"}
        assert all(isinstance(value, str) and value == value.strip() for value in row.values())
        assert not re.match("Q:|A:", row["question"])


@pytest.mark.parametrize("kind", KINDS)
def test_answer_is_read_back_and_stated_as_the_task_states_it(kind: str) -> None:
    task, labels = make(kind), set()
    for row in exemplars(kind):
        choices = tuple(re.findall(r"^\([a-z]\) (.+)$", row["question"], re.MULTILINE))
        example = Example(id="0", input=row["question"], prompt="", choices=choices)
        stated = re.findall(task.answer_pattern(), f"{row['rationale']} {row['answer']}")
        assert len(stated) == 1
        label = task.normalise(stated[0], example)
        assert label is not None
        assert task.answer_sentence(label, example) == row["answer"]
        labels.add(label)
    assert len(labels) >= {"strategyqa": 2, "esnli": 3, "anli": 3}.get(kind, 8)


@pytest.mark.parametrize("kind", ["gsm8k", "svamp", "strategyqa"])
def test_arithmetic_is_right(kind: str) -> None:
    for row in exemplars(kind):
        for left, right in re.findall(r"((?:[\d.]+ [-+*/] )+[\d.]*\d) = \$?([\d.]*\d)", row["rationale"]):
            assert equation_value(left) == parse_number(right), row["rationale"]
        if kind == "svamp":
            assert equation_value(row["answer"].removeprefix("The answer is ")) in {
                parse_number(number) for number in re.findall(r"= (\d+)", row["rationale"])
            }
        if kind == "gsm8k":
            assert parse_number(row["rationale"]) == parse_number(row["answer"])


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason=f"no data sets under {SHARED}/data")
@pytest.mark.parametrize("kind", FOLDERS)
def test_none_is_a_row_of_the_data(kind: str) -> None:
    task = make(kind, data=str(SHARED / "data" / FOLDERS[kind]))
    ours = {normalise_text(row["question"].split("\n")[0]) for row in exemplars(kind)}
    for examples in task.read().values():
        theirs = {normalise_text(example.input.split("\nAnswer Choices:")[0]) for example in examples}
        assert not ours & theirs
