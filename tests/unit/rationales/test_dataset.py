"""The rationale data set: what is asked again after a kill, what is counted, and what comes back from Parquet."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from distill_llm.core.errors import StorageError
from distill_llm.core.example import Example, TeacherAnswer
from distill_llm.core.files import Journal
from distill_llm.core.progress import SILENT
from distill_llm.rationales.dataset import funnel, make_rows, read_rows, save_rows, teacher_answers
from distill_llm.rationales.generate import complete, make_requests
from distill_llm.rationales.keep import AgreesWithLabel, MinAgreement
from distill_llm.rationales.prompts import Prompter
from distill_llm.rationales.spec import RationaleSpec
from distill_llm.tasks.jsonl import Jsonl
from distill_llm.teachers.base import Completion, Request

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from distill_llm.rationales.dataset import RationaleRow

TASK = Jsonl.model_validate({"data": "nowhere.jsonl", "fields": {"input": ["q"]}})
EXAMPLES = (
    Example(id="one", input="q1", prompt="Q: 1\nA:", label="2"),
    Example(id="two", input="q2", prompt="Q: 2\nA:", label="3"),
    Example(id="three", input="q3", prompt="Q: 3\nA:"),
)
PROMPTER = Prompter("", "{prompt}")


def _spec(**changes: Any) -> RationaleSpec:
    facts = {"teacher": {"kind": "gold"}, "samples": 2, "sampling": {"temperature": 0.7}}
    return RationaleSpec.model_validate(facts | changes)


def _requests(spec: RationaleSpec | None = None, **changes: Any) -> list[Request]:
    facts: dict[str, Any] = {"examples": EXAMPLES, "split": "train", "prompter": PROMPTER, "identity": "big@1"}
    return make_requests(spec=spec or _spec(), **(facts | changes))


class _Teacher:
    """Answers backwards, counts what it is asked, and may be killed after some answers."""

    identity = "big@1"

    def __init__(self, dies_after: int = 1000):
        self.asked: list[str] = []
        self._dies_after = dies_after

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Completion]]:
        for request in reversed(requests):
            if len(self.asked) == self._dies_after:
                raise KeyboardInterrupt
            self.asked.append(request.key)
            text = f"Chain of {request.example.id}, {request.sample}. The answer is {request.sample}."
            yield request, Completion(text, tokens_in=5, tokens_out=7)


def test_one_request_an_example_and_sample() -> None:
    requests = _requests()
    assert [(request.example.id, request.sample) for request in requests] == [
        ("one", 0), ("one", 1), ("two", 0), ("two", 1), ("three", 0), ("three", 1),
    ]  # fmt: skip
    assert len({request.key for request in requests}) == 6
    assert requests[2].prompt == "Q: 2\nA:"


@pytest.mark.parametrize(
    "changed",
    [
        {"identity": "big@2"},
        {"split": "test"},
        {"prompter": Prompter("Q: x\nA: y\n\n", "{prompt}")},
        {"spec": _spec(sampling={"temperature": 0.8})},
        {"spec": _spec(sampling={"temperature": 0.7, "stop": ["\n"]})},
        {"examples": tuple(replace(example, id=f"{example.id}'") for example in EXAMPLES)},
    ],
)
def test_a_key_changes_with_all_that_decides_the_completion(changed: dict[str, Any]) -> None:
    before = {request.key for request in _requests()}
    assert not before & {request.key for request in _requests(**changed)}


def test_a_key_does_not_change_with_rules_or_the_number_of_samples() -> None:
    spec = _spec(samples=3, keep=[{"kind": "agrees_with_label"}])
    assert {request.key for request in _requests()} < {request.key for request in _requests(spec)}


def test_a_killed_run_asks_for_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    killed, second, third = _Teacher(dies_after=4), _Teacher(), _Teacher()
    with pytest.raises(KeyboardInterrupt):
        complete(_requests(), killed, Journal(path), SILENT, "rationales")
    whole = complete(_requests(), second, Journal(path), SILENT, "rationales")
    again = complete(_requests(), third, Journal(path), SILENT, "rationales")
    assert (len(killed.asked), len(second.asked), third.asked) == (4, 2, [])
    assert not set(killed.asked) & set(second.asked)
    assert again == whole
    assert [whole[request.key].text for request in _requests()][3] == "Chain of two, 1. The answer is 1."
    assert whole[_requests()[0].key] == Completion("Chain of one, 0. The answer is 0.", 5, 7)


def test_a_torn_answer_is_asked_for_again_and_only_that(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = _Teacher()
    complete(_requests(), first, Journal(path), SILENT, "rationales")
    path.write_bytes(path.read_bytes()[:-9])
    second = _Teacher()
    complete(_requests(), second, Journal(path), SILENT, "rationales")
    assert second.asked == [first.asked[-1]]


def _rows(rules: Sequence[Any] = ()) -> list[RationaleRow]:
    """one: 2, 2, unreadable. two: 3, 4, 4. three (no gold label): 5, no rationale; empty."""
    texts = {
        "one": ("Good. The answer is 2.", "Fine. The answer is 2.", "I do not know."),
        "two": ("Right. The answer is 3.", "Wrong. The answer is 4.", "Bad. The answer is 4."),
        "three": ("Free. The answer is 5.", "The answer is 5.", ""),
    }
    requests = _requests(_spec(samples=3))
    completions = {r.key: Completion(texts[r.example.id][r.sample], 10, r.sample) for r in requests}
    return make_rows(requests, completions, TASK, rules)


def test_without_rules_all_that_can_be_read_is_kept() -> None:
    rows = _rows()
    assert [row.outcome for row in rows] == [
        "kept", "kept", "unparsable: no answer sentence",
        "kept", "kept", "kept",
        "kept", "no rationale", "unparsable: empty",
    ]  # fmt: skip
    assert teacher_answers(rows) == {
        "one": TeacherAnswer("2", ("Good.", "Fine."), 2 / 3),
        "two": TeacherAnswer("4", ("Right.", "Wrong.", "Bad."), 2 / 3),
        "three": TeacherAnswer("5", ("Free.",), 2 / 3),
    }


def test_rules_drop_and_the_first_that_fails_is_named() -> None:
    rows = _rows([MinAgreement(share=0.6), AgreesWithLabel()])
    assert [row.outcome for row in rows[3:7]] == ["kept", *["rule: agrees_with_label"] * 3]
    assert teacher_answers(rows)["two"] == TeacherAnswer("4", ("Right.",), 2 / 3)
    assert {row.outcome for row in _rows([MinAgreement(share=0.7)])} >= {"rule: min_agreement"}
    assert teacher_answers(_rows([MinAgreement(share=0.7)]))["one"] == TeacherAnswer("2", (), 2 / 3)


def test_the_funnel_counts_every_completion_once() -> None:
    counts = funnel(_rows([AgreesWithLabel()]), TASK)
    assert counts == {
        "examples": 3,
        "completions": 9,
        "parsed": 7,
        "kept": 3,
        "dropped, no rationale": 1,
        "dropped, rule: agrees_with_label": 3,
        "dropped, unparsable: empty": 1,
        "dropped, unparsable: no answer sentence": 1,
        "examples_with_gold_label": 2,
        "accuracy": 0.5,
        "tokens_in": 90,
        "tokens_out": 9,
    }


def test_an_unparsable_example_counts_as_wrong_and_no_gold_label_as_unknown() -> None:
    requests = _requests(_spec(samples=1))
    rows = make_rows(requests, {request.key: Completion("?") for request in requests}, TASK, [])
    assert (funnel(rows, TASK)["accuracy"], funnel(rows, TASK)["parsed"]) == (0.0, 0)
    assert funnel([row for row in rows if row.example_id == "three"], TASK)["accuracy"] is None
    assert teacher_answers(rows)["one"] == TeacherAnswer(None, (), 0.0)


def test_parquet_gives_the_same_rows_back_here_and_in_datasets(tmp_path: Path) -> None:
    from datasets import load_dataset

    path, rows = tmp_path / "train.parquet", _rows()
    save_rows(path, rows)
    assert read_rows(path) == rows
    loaded = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == 9
    assert loaded[3]["rationale"] == "Right."
    assert loaded[6]["gold_label"] is None
    assert loaded["agreement"][0] == pytest.approx(2 / 3)
    assert {loaded.features[name].dtype for name in ("sample", "tokens_in")} == {"int64"}


def test_columns_that_are_empty_in_all_rows_keep_their_type(tmp_path: Path) -> None:
    rows = [replace(row, gold_label=None, teacher_label=None) for row in _rows()]
    save_rows(tmp_path / "train.parquet", rows)
    assert read_rows(tmp_path / "train.parquet") == rows
    save_rows(tmp_path / "none.parquet", [])
    assert read_rows(tmp_path / "none.parquet") == []


def test_a_file_of_another_version_says_what_to_do(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"example_id": ["a"], "text": ["b"]}), tmp_path / "old.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    for name in ("old", "broken", "gone"):
        with pytest.raises(StorageError, match="without asking the teacher"):
            read_rows(tmp_path / f"{name}.parquet")
