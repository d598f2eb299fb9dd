"""Completions that exist already go to the example, sample and split that they belong to, from every kind of file."""

from __future__ import annotations

import json
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from distill_llm.core.errors import ConfigError, TeacherError
from distill_llm.core.example import Example
from distill_llm.rationales.generate import entry_of
from distill_llm.tasks.jsonl import Jsonl
from distill_llm.teachers.base import Completion, Failure, Request, Sampling, TeacherFacts
from distill_llm.teachers.replay import Replay

if TYPE_CHECKING:
    from collections.abc import Sequence

TASK = Jsonl.model_validate({"data": "nowhere.jsonl", "fields": {"input": ["q"]}})
PUBLISHED = Path(__file__).parents[4] / "shared" / "data" / "dss"


def _request(number: int, *, sample: int = 0, split: str = "train", hinted: bool = False, **example: Any) -> Request:
    facts: dict[str, Any] = {"id": f"e{number}", "input": "", "prompt": "", "origin": "train", "row": number}
    return Request("0", Example(**(facts | example)), split, sample, "", hinted)


def _open(spec: Replay) -> Any:
    spec.check(chat=False, sampling=Sampling())
    return spec.open(task=TASK, sampling=Sampling(), seed=0)


def _replay(folder: Path, **files: str) -> Any:
    return _open(Replay.model_validate({"name": "big", "files": {k: str(folder / v) for k, v in files.items()}}))


def _results(teacher: Any, requests: Sequence[Request]) -> list[Any]:
    found = list(teacher.complete(requests))
    assert [request for request, _ in found] == list(requests)
    return [result.text if isinstance(result, Completion) else result for _, result in found]


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".csv":
        names = list(rows[0])
        lines = [",".join(names), *(",".join(json.dumps(str(row[name])) for name in names) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_replay_takes_the_row_of_the_split_that_the_example_came_from(tmp_path: Path) -> None:
    """The source's own split and row: validation may have been cut from train, and train cut short."""
    for number in (1, 2, 10):
        (tmp_path / f"part_{number}.json").write_text(json.dumps([f"{number} a", f"{number} b"]))
    (tmp_path / "test.json").write_text('["t0"]')
    teacher = _replay(tmp_path, train="part_*.json", test="test.json")
    requests = [_request(4), _request(0), _request(3, split="validation"), _request(0, origin="test")]
    assert _results(teacher, requests) == ["10 a", "1 a", "2 b", "t0"]


def test_replay_says_which_row_has_no_completion(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('["one"]')
    teacher = _replay(tmp_path, train="train.json")
    with pytest.raises(TeacherError, match=r"the train split has a row 3, but only 1 .*`id_field`"):
        _results(teacher, [_request(2)])
    with pytest.raises(TeacherError, match="the test split has a row 1, but only 0"):
        _results(teacher, [_request(0, origin="test")])


def test_replay_takes_no_more_requests_than_it_has_answered(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('["a", "b", "c"]')
    endless = (_request(number) for number in count())
    first = list(islice(_replay(tmp_path, train="train.json").complete(endless), 2))
    assert [result for _, result in first] == [Completion("a"), Completion("b")]
    assert next(endless).example.id == "e2"


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet"])
def test_every_kind_of_file_gives_texts_and_token_counts(tmp_path: Path, name: str) -> None:
    rows = [{"said": f'so, "{i}"', "id": i, "tokens_in": 7 * i, "tokens_out": i} for i in range(3)]
    path = _write(tmp_path / name, [{k: str(v).replace('"', "'") for k, v in row.items()} for row in rows])
    teacher = _open(Replay(data=str(path), text_field="said"))
    (_, result), *_ = teacher.complete([_request(2)])
    assert result == Completion("so, '2'", tokens_in=14, tokens_out=2)


def test_a_row_may_hold_several_samples(tmp_path: Path) -> None:
    (tmp_path / "bare.json").write_text('[["a", "b"], "c", []]')
    _write(tmp_path / "rows.parquet", [{"text": ["a", "b"]}, {"text": ["c"]}, {"text": None}])
    for name in ("bare.json", "rows.parquet"):
        teacher = _replay(tmp_path, train=name)
        second = [_request(number, sample=1) for number in range(3)]
        assert _results(teacher, [_request(0), _request(1)]) == ["a", "c"]
        assert _results(teacher, second) == [
            "b",
            Failure("example 'e1' has 1 texts to replay; sample 2 was asked for"),
            Failure("example 'e2' has 0 texts to replay; sample 2 was asked for"),
        ]
        with pytest.raises(TeacherError, match=r"sample 3 of example 'e0' .*more than 2 .*Lower `rationales\.samples`"):
            _results(teacher, [_request(0, sample=2)])


def test_token_counts_of_several_samples_are_a_list(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", [{"text": ["a", "b"], "tokens_in": [3, 3], "tokens_out": 9}])
    results = [result for _, result in _open(Replay(data=str(path))).complete([_request(0), _request(0, sample=1)])]
    assert results == [Completion("a", 3), Completion("b", 3)], "9 is of both together: it says nothing of one"


def test_rows_with_ids_may_come_in_any_order(tmp_path: Path) -> None:
    rows = [{"text": f"{i} {sample}", "of": f"e{i}"} for sample in range(2) for i in (3, 1, 2)]
    teacher = _open(Replay(data=str(_write(tmp_path / "a.parquet", rows)), id_field="of"))
    requests = [_request(2), _request(3, sample=1), _request(1, origin="test", split="test"), _request(9)]
    results = _results(teacher, requests)
    assert results[:3] == ["2 0", "3 1", "1 0"]
    assert results[3] == Failure("no row has the id 'e9'; 3 other ids are there to replay")


def test_one_id_may_stand_in_two_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        _write(tmp_path / f"{split}.jsonl", [{"text": split, "id": 1}])
    teacher = _open(Replay(data=str(tmp_path), id_field="id"))
    assert _results(teacher, [_request(0, id="1", origin=split) for split in ("test", "train")]) == ["test", "train"]


def test_a_split_without_completions_ends_it(tmp_path: Path) -> None:
    _write(tmp_path / "train.jsonl", [{"text": "a", "id": "e0"}])
    teacher = _open(Replay(data=str(tmp_path), id_field="id"))
    with pytest.raises(TeacherError, match=r"for the test split; those that are there are of \['train'\]"):
        _results(teacher, [_request(0, origin="test", split="test")])


def test_the_journal_of_a_run_can_be_replayed(tmp_path: Path) -> None:
    """Its splits are those that the run made: the example of the source's train may be of our test split."""
    asked = {
        _request(1): Completion("plain", 5, 6),
        _request(1, hinted=True): Completion("told", 9, 7),
        _request(2, split="test"): Completion("for the test", 5, 4, cut=True),
        _request(1, sample=1): Completion("again", 5, 1),
    }
    rows = [dict(entry_of(request, completion)) for request, completion in asked.items()]
    path = str(_write(tmp_path / "journal.jsonl", rows))
    for source in ({"data": path}, {"files": {"train": path}}):
        spec = Replay.model_validate(source | {"id_field": "example", "split_field": "split"})
        assert dict(_open(spec).complete(asked)) == asked


def test_a_hint_is_not_answered_with_a_text_that_had_none(tmp_path: Path) -> None:
    rows = [{"text": "plain", "id": "e0"}]
    nothing = Failure("no completions to prompts that tell the label are there to replay")
    for name, field in (("train.jsonl", ""), ("ids.jsonl", "id")):
        teacher = _open(Replay(data=str(_write(tmp_path / name, rows)), id_field=field))
        assert _results(teacher, [_request(0, hinted=True), _request(0)]) == [nothing, "plain"]


def test_a_hub_data_set_is_replayed_by_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, DatasetDict

    from distill_llm.tasks import hub

    found = DatasetDict({split: Dataset.from_dict({"text": [f"{split} 0"]}) for split in ("train", "test", "other")})
    monkeypatch.setattr(hub, "_probe", lambda name: None)
    monkeypatch.setattr(hub, "_load", lambda name, config: found)
    teacher = _open(Replay(data="some/where"))
    assert _results(teacher, [_request(0, origin=split) for split in ("test", "train")]) == ["test 0", "train 0"]


def test_other_texts_are_another_teacher_and_another_file_is_not(tmp_path: Path) -> None:
    def identity(name: str, rows: list[Any]) -> str:
        return _open(Replay(name="big", data=str(_write(tmp_path / name, rows)))).identity

    before = identity("a.json", ["one", "two"])
    assert identity("b.jsonl", [{"text": "one"}, {"text": "two"}]) == before
    assert before.startswith("replay big ")
    others = (["one", "tw"], ["two", "one"], ["onetwo"], ["one", "two", ""], [["one", "two"]])
    assert len({before, *(identity("a.json", rows) for rows in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": "b"}', r"the field 'text' is missing; the row has \['a'\]\. .*`text_field`"),
        ("[1]", "row 1: it is a int"),
        ("[", "not valid JSON"),
        ("[[1]]", r"the field 'text' is \[1\]\. Expected a text or a list of texts"),
        ("", "it has no rows"),
    ],
)
def test_what_is_no_text_is_refused_before_anything_is_asked(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "train.json").write_text(content)
    spec = Replay.model_validate({"files": {"train": str(tmp_path / "train.json")}})
    with pytest.raises(ConfigError, match=rf"^rationales\.teacher\.files\.train: .*{message}"):
        spec.check(chat=False, sampling=Sampling())


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    for recipe, message in (
        ({"files": {"test": "none_*.json"}}, r"files\.test: no file matches 'none_\*\.json'"),
        ({"data": "none/at/all.json"}, r"data: data 'none/at/all\.json': no such file or folder"),
        ({"data": str(tmp_path)}, r"data: the folder .* has no completions\. Expected train"),
        ({"data": str(_write(tmp_path / "a.jsonl", [{"text": "a"}])), "id_field": "id"}, "data: .* 'id' is missing"),
    ):
        with pytest.raises(ConfigError, match=rf"^rationales\.teacher\.{message}"):
            Replay.model_validate(recipe).check(chat=False, sampling=Sampling())


def test_one_source_is_given() -> None:
    for recipe, came in (({}, "none"), ({"data": "a.json", "files": {"train": "b.json"}}, "both")):
        with pytest.raises(ValidationError, match=f"as `files` or as `data`; {came} came"):
            Replay.model_validate(recipe)


def test_replayed_texts_have_no_log_probabilities(tmp_path: Path) -> None:
    spec = Replay(data=str(_write(tmp_path / "a.jsonl", [{"text": "a"}])))
    with pytest.raises(ConfigError, match=r"rationales\.sampling\.top_logprobs: .*kind replay"):
        spec.check(chat=False, sampling=Sampling(top_logprobs=5))


def test_name_and_licence_are_those_of_the_recipe() -> None:
    assert Replay(name="big", data="a", licence="mit").describe() == TeacherFacts("big", licence="mit")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"the published completions are not in {PUBLISHED}")
@pytest.mark.parametrize(("task", "rows", "files"), [("cqa", 9741, 10), ("svamp", 800, 2)])
def test_published_completions_keep_the_order_of_the_rows(task: str, rows: int, files: int) -> None:
    folder = PUBLISHED / task
    teacher = _replay(folder / "llm", train="train_CoT_*.json")
    first = json.loads((folder / "llm" / "train_CoT_0.json").read_text())
    last = json.loads((folder / "llm" / f"train_CoT_{files - 1}.json").read_text())
    found = _results(teacher, [_request(number) for number in (0, len(first) - 1, rows - len(last), rows - 1)])
    assert found == [first[0], first[-1], last[0], last[-1]]
    with pytest.raises(TeacherError, match=f"only {rows} completions"):
        _results(teacher, [_request(rows)])
