"""Rows are read from every kind of file, and bad input gives one error that says where, what and what to do."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from distill_llm.core.errors import DataError
from distill_llm.tasks.source import Layout, Row, read_file, read_splits

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [{"id": "1", "question": "one, or two?"}, {"id": "2", "question": 'said "no"'}]
LAYOUT = Layout({"train": ("toy_train", "train"), "test": ("toy_test", "test")})


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text('id,question\n1,"one, or two?"\n2,"said ""no"""\n', encoding="utf-8-sig")
    elif path.stem == "list":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


@pytest.mark.parametrize("name", ["list.json", "lines.json", "lines.jsonl", "table.csv", "table.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert [dict(row) for row in read_file(write(tmp_path / name, ROWS))] == ROWS


def test_folder_gives_the_splits_that_it_has(tmp_path: Path) -> None:
    write(tmp_path / "toy_train.json", ROWS)
    write(tmp_path / "test.csv", ROWS)
    assert {split: len(rows) for split, rows in read_splits(str(tmp_path), LAYOUT).items()} == {"train": 2, "test": 2}


def test_single_file_is_all_train(tmp_path: Path) -> None:
    assert list(read_splits(str(write(tmp_path / "mine.jsonl", ROWS)), LAYOUT)) == ["train"]


def test_data_of_the_package_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(read_splits("data/sample/questions.jsonl", LAYOUT)["train"]) == 60


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl:2: not valid JSON .* correct the line"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', r"a\.json:2: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl:2: it is a list\. Expected an object"),
        ("a.json", '[{"a": 1}, 7]', r"a\.json, row 2: it is a int\. Expected an object"),
        ("a.jsonl", "\n \n", r"a\.jsonl: it has no rows\. Expected at least one"),
        ("a.json", "[]", r"it has no rows"),
        ("a.csv", "a,b\n", r"it has no rows"),
        ("a.csv", "a,b\n1,2,3\n", r"a\.csv:2: more columns than the header's \['a', 'b'\]"),
        ("a.csv", 'a,b\n1,"2\n', r"a\.csv:2: not valid CSV"),
        ("a.parquet", "no parquet", r"a\.parquet: not a Parquet file"),
        ("a.txt", "hello", r"a\.txt: cannot read '\.txt' files\. Expected of the kind \.json"),
    ],
)
def test_bad_file_says_where_and_what(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_file(tmp_path / name)


def test_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"a": "caf\u00e9"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 text .* Save it as UTF-8"):
        read_file(tmp_path / "a.jsonl")


def test_missing_file_says_from_where_it_was_looked_for() -> None:
    with pytest.raises(
        DataError, match=r"data 'no/such\.json': no such file or folder \(looked from .*correct the path"
    ):
        read_splits("no/such.json", LAYOUT)


def test_folder_without_training_file_lists_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "other.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no training file\. Expected toy_train or train .* it has \['other\.jsonl'\]"):
        read_splits(str(tmp_path), LAYOUT)


def test_field_that_is_missing_names_row_and_fields() -> None:
    row = Row({"a": "1", "b": " ", "c": [1], "d": 5, "e": None}, "x.jsonl", 7)
    assert (row.text("a"), row.text("d"), row.optional("b"), row.optional("e"), row.optional("z")) == (
        "1",
        "5",
        *[None] * 3,
    )
    with pytest.raises(DataError, match=r"x\.jsonl, row 7: the field 'z' is missing; the row has \['a', 'b', 'c'"):
        row.text("z")
    with pytest.raises(DataError, match=r"the field 'b' is empty"):
        row.text("b")
    with pytest.raises(DataError, match=r"the field 'c' is a list\. Expected text"):
        row.text("c")


def test_list_field_may_be_json_in_a_csv() -> None:
    row = Row({"good": '["x", "y"]', "list": ["x", 2], "bad": "x,y", "hole": ["x", ""]}, "x.csv", 1)
    assert row.texts("good") == ("x", "y")
    assert row.texts("list") == ("x", "2")
    for name in ("bad", "hole", "none"):
        with pytest.raises(DataError, match=rf"the field '{name}' .*Expected a list of texts"):
            row.texts(name)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


@pytest.mark.usefixtures("no_network")
def test_hub_that_cannot_be_reached_is_said_soon() -> None:
    import datasets.config

    before, start = datasets.config.HF_HUB_OFFLINE, time.monotonic()
    with pytest.raises(DataError, match=r"data 'some/where', config main: .*the Hub cannot be reached .*`task\.data`"):
        read_splits("some/where", Layout({"train": ("train",)}, hub_config="main"))
    assert time.monotonic() - start < 5
    assert before == datasets.config.HF_HUB_OFFLINE


def test_rows_of_the_hub_have_class_names_and_known_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    from distill_llm.tasks import hub

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    split = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    monkeypatch.setattr(hub, "_probe", lambda name: None)
    monkeypatch.setattr(hub, "_load", lambda name, config: DatasetDict({"training": split}))
    rows = read_splits("some/where", Layout({}, {"train": "training", "test": "test"}))
    assert [row["label"] for row in rows["train"]] == ["yes", "no", None]
    with pytest.raises(DataError, match=r"it has no split 'train', only \['training'\]"):
        read_splits("some/where", Layout({}))


def test_images_of_the_hub_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their content, which nobody decodes before it is looked at."""
    from datasets import Dataset, DatasetDict, Features, Image, Value

    from distill_llm.tasks import hub

    features = Features({"text": Value("string"), "scan": Image()})
    split = Dataset.from_dict({"text": ["a"], "scan": [{"bytes": b"no image", "path": None}]}, features=features)
    monkeypatch.setattr(hub, "_probe", lambda name: None)
    monkeypatch.setattr(hub, "_load", lambda name, config: DatasetDict({"train": split}))
    (row,) = read_splits("some/where", Layout({}, {"train": "train"}))["train"]
    assert row.image("scan") == b"no image"


def test_script_on_the_hub_is_read_from_its_parquet_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from distill_llm.tasks import hub

    calls = []

    def load_dataset(*args: object, **options: object) -> datasets.DatasetDict:
        calls.append(options)
        if len(calls) == 1:
            raise RuntimeError("Dataset scripts are no longer supported, but found x.py")
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": ["1"]})})

    monkeypatch.setattr(hub, "_probe", lambda name: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_splits("some/where", LAYOUT)["train"]) == 1
    assert calls[1]["revision"] == "refs/convert/parquet"
