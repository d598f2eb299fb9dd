"""The task for a user's own data: columns, templates, choices, patterns, and what is wrong with them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from distill_llm.core.errors import DataError
from distill_llm.core.example import Example, Splits
from distill_llm.tasks.jsonl import Jsonl

if TYPE_CHECKING:
    from pathlib import Path

SAMPLE = {
    "data": "data/sample/questions.jsonl",
    "fields": {"id": "id", "input": "question", "label": "label", "rationale": "rationale", "choices": "choices"},
}


def task(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> Jsonl:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return Jsonl.model_validate({"data": str(path), **settings})


def _parts(splits: Splits) -> dict[str, tuple[Example, ...]]:
    return {"train": splits.train, "validation": splits.validation, "test": splits.test}


def test_sample_data_loads() -> None:
    splits = Jsonl.model_validate(SAMPLE).load(seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (49, 5, 6)
    for example in splits.train:
        assert example.label in example.choices
        assert example.rationale
        assert example.prompt == f"Q: {example.input}\nA:"
        assert example.input.endswith("".join(f"\n({'abcd'[i]}) {c}" for i, c in enumerate(example.choices)))


def test_sample_answers_read_back() -> None:
    sample = Jsonl.model_validate(SAMPLE)
    for example in sample.load(seed=0).train:
        assert example.label is not None
        sentence = sample.answer_sentence(example.label, example)
        (stated,) = re.findall(sample.answer_pattern(), f"{example.rationale} {sentence}")
        assert sample.normalise(stated, example) == example.label


def test_template_and_several_columns(tmp_path: Path) -> None:
    rows = [{"premise": "It rains.", "hypothesis": "It is wet.", "label": 1}]
    by_template = task(tmp_path, rows, template="{premise} -> {hypothesis} {{sic}}").read()["train"][0]
    assert by_template.input == "It rains. -> It is wet. {sic}"
    by_columns = task(tmp_path, rows, fields={"input": ["premise", "hypothesis"]}).read()["train"][0]
    assert by_columns.input == "It rains.\nIt is wet."
    assert (by_columns.id, by_columns.label, by_columns.choices) == ("train-1", "1", ())


def test_row_without_label_is_unlabelled(tmp_path: Path) -> None:
    rows = [{"input": "a", "label": "x"}, {"input": "b", "label": None}, {"input": "c", "label": ""}, {"input": "d"}]
    assert [e.label for e in task(tmp_path, rows, fields={"input": "input"}).read()["train"]] == ["x", None, None, None]
    assert task(tmp_path, rows, fields={"input": "input", "label": None}).read()["train"][0].label is None


def test_choices_of_all_rows_and_of_each_row(tmp_path: Path) -> None:
    rows = [{"q": "sky?", "options": ["red", "blue"], "label": "B"}]
    own = task(tmp_path, rows, fields={"input": "q", "choices": "options"})
    example = own.read()["train"][0]
    assert (example.label, example.choices) == ("blue", ("red", "blue"))
    assert own.answer_sentence("blue", example) == "So the answer is (b) blue."
    shared = task(tmp_path, [{"q": "wet?", "label": "Yes"}], fields={"input": "q"}, choices=["yes", "no"])
    example = shared.read()["train"][0]
    assert (example.label, example.input) == ("yes", "wet?")
    assert shared.answer_sentence("yes", example) == "The answer is yes."


def test_test_and_validation_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "test.csv").write_text("input,label\nb,y\n")
    (tmp_path / "valid.jsonl").write_text('{"input": "c", "label": "z"}')
    mine = task(
        tmp_path,
        [{"input": "a", "label": "x"}],
        fields={"input": "input"},
        test_data=str(tmp_path / "more"),
        validation_data=str(tmp_path / "valid.jsonl"),
    )
    assert {split: [e.input for e in part] for split, part in _parts(mine.load(0)).items()} == {
        "train": ["a"],
        "validation": ["c"],
        "test": ["b"],
    }


@pytest.mark.parametrize(
    ("metric", "text", "label"),
    [
        ("text", " a cat. ", "a cat"),
        ("text", " . ", None),
        ("number", "$1,080 in all", "1080"),
        ("number", "many", None),
        ("equation", "(2 + 3).", "(2 + 3)"),
        ("equation", "two", None),
    ],
)
def test_metric_decides_what_an_answer_is(tmp_path: Path, metric: str, text: str, label: str | None) -> None:
    mine = task(tmp_path, [{"input": "a", "label": "1"}], fields={"input": "input"}, metric=metric)
    assert mine.answer_kind() == metric
    assert mine.normalise(text, mine.read()["train"][0]) == label


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "{a} {b"}, "is no template"),
        ({"template": "no column"}, "names no column"),
        ({"template": "{a.b}"}, "'a.b' is not a plain column name"),
        ({"template": "{a!r}"}, "not a plain column name"),
        ({"template": "{}"}, "'' is not a plain column name"),
        ({"template": "{a}", "fields": {"input": "a"}}, "give one of them"),
        ({}, "give one of them"),
        ({"template": "{a}", "pattern": "answer (.*"}, "is not a regular expression"),
        ({"template": "{a}", "pattern": "answer .*"}, "has 0 groups, expected one"),
        ({"template": "{a}", "pattern": "(answer) (.*)"}, "has 2 groups, expected one"),
        ({"template": "{a}", "choices": ["x"], "fields": {"choices": "c"}}, "give one of `choices`"),
        ({"template": "{a}", "choices": ["x", "x"]}, "holds one twice"),
        ({"template": "{a}", "metric": "bleu"}, "metric"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        Jsonl.model_validate({"data": "x.jsonl", **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "{b}"}, r"rows\.jsonl, row 1: the field 'b' is missing; the row has \['a', 'label'\]"),
        ({"template": "{a}", "fields": {"label": "gold"}}, r"no row has the field 'gold' that `fields\.label` names"),
        ({"template": "{a}", "fields": {"rationale": "why"}}, r"no row has the field 'why' that `fields\.rationale`"),
        ({"template": "{a}", "fields": {"id": "key"}}, r"row 1: the field 'key' is missing"),
        ({"template": "{a}", "fields": {"choices": "a"}}, r"row 1: the field 'a' is '1'\. Expected a list of texts"),
        ({"template": "{a}", "fields": {"id": "label"}}, r"ids stand on more than one example"),
        (
            {"template": "{a}", "choices": ["p", "q"]},
            r"has the label 'x', which is not one of its choices \['p', 'q'\]",
        ),
    ],
)
def test_wrong_columns_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    rows = [{"a": str(i), "label": "x"} for i in range(1, 9)]
    with pytest.raises(DataError, match=message):
        task(tmp_path, rows, **settings).load(0)


def test_too_many_choices_for_the_alphabet(tmp_path: Path) -> None:
    mine = task(
        tmp_path, [{"a": "1", "c": [str(i) for i in range(27)], "label": "3"}], fields={"input": "a", "choices": "c"}
    )
    with pytest.raises(DataError, match=r"row 1: 27 choices\. Expected at most 26"):
        mine.read()


def test_pictures_of_the_data(tmp_path: Path) -> None:
    """A path is seen from the data's file, an image in the data is its content; the same words are then two inputs."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"question": "what is this ?", "label": "a", "scan": f"{number}.png"} for number in range(20)]
    fields = {"input": "question", "picture": "scan"}
    splits = task(tmp_path, rows, fields=fields).load(seed=0)
    pictures = [example.picture for part in _parts(splits).values() for example in part]
    assert sorted(map(str, pictures)) == sorted(str(tmp_path / f"{number}.png") for number in range(20))
    held = [{"question": "q", "label": "a", "scan": {"bytes": bytes([number]), "path": None}} for number in range(20)]
    parquet.write_table(pa.Table.from_pylist(held), tmp_path / "held.parquet")
    held_task = Jsonl.model_validate({"data": str(tmp_path / "held.parquet"), "fields": fields})
    assert held_task.load(seed=0).train[0].picture in [bytes([number]) for number in range(20)]
    with pytest.raises(DataError, match=r"row 1: the field 'scam' is missing.* Expected an image, or the path"):
        task(tmp_path, rows, fields=fields | {"picture": "scam"}).load(seed=0)
    with pytest.raises(DataError, match="inputs are in both"):
        task(tmp_path, [{**row, "scan": "same.png"} for row in rows], fields=fields).load(seed=0)
