"""The rationale data set: votes, rules, hints, what is counted, and what comes back from Parquet."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest

from distill_llm.core.errors import StorageError
from distill_llm.core.example import TeacherAnswer
from distill_llm.rationales.dataset import (
    COLUMNS,
    Funnel,
    RationaleRow,
    judge,
    make_rows,
    read_rows,
    row_writer,
    teacher_answers,
)
from distill_llm.rationales.keep import AgreesWithLabel, Dedupe, Majority, MinAgreement, Parsable, Shortest
from distill_llm.teachers.base import Completion, TokenScores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from distill_llm.rationales.keep import Keep

TEXTS = {
    "one": ("Good. The answer is 2.", "Fine. The answer is 2.", "I do not know."),
    "two": ("Right. The answer is 3.", "Wrong. The answer is 4.", "Bad. The answer is 4."),
    "three": ("Free. The answer is 5.", "The answer is 5.", ""),  # has no gold label
}
Rows = list[RationaleRow]


@pytest.fixture
def rows_of(asker: Any, examples: Any, task: Any) -> Callable[..., Rows]:
    """``rows_of(rules, texts, hinted={"two": (...)})``; a text of None is not there."""

    def make(rules: Sequence[Keep] = (), texts: Any = TEXTS, hinted: Any = None) -> Rows:
        hints = hinted or {}
        made = asker(samples=3, hint_retry={"samples": max([len(h) for h in hints.values()], default=1)})
        found: Rows = []
        for example in examples:
            plain = made.requests(example, "train")
            told = made.hinted(example, "train")[: len(hints.get(example.id, ()))]
            written = dict(zip([r.key for r in plain], texts[example.id], strict=True))
            written |= dict(zip([r.key for r in told], hints.get(example.id, ()), strict=True))
            there = {
                key: Completion(text, 10, i % 3) for i, (key, text) in enumerate(written.items()) if text is not None
            }
            found += make_rows(judge(plain, there.get, task), judge(told, there.get, task), task, rules)
        return found

    return make


def _outcomes(rows: Rows, example: str = "") -> list[str]:
    return [row.outcome for row in rows if example in ("", row.example_id)]


def test_without_rules_any_text_is_kept(rows_of: Any) -> None:
    assert _outcomes(rows_of()) == [
        "kept", "kept", "kept",
        "kept", "kept", "kept",
        "kept", "no rationale", "empty",
    ]  # fmt: skip


def test_what_can_be_read_is_kept(rows_of: Any) -> None:
    rows = rows_of([Parsable()])
    assert _outcomes(rows, "one") == ["kept", "kept", "unparsable: no answer sentence"]
    assert teacher_answers(rows) == {
        "one": TeacherAnswer("2", ("Good.", "Fine."), 2 / 3),
        "two": TeacherAnswer("4", ("Right.", "Wrong.", "Bad."), 2 / 3),
        "three": TeacherAnswer("5", ("Free.",), 2 / 3),
    }


@pytest.mark.parametrize("rule", [Parsable(), AgreesWithLabel(), Majority()], ids=lambda rule: rule.kind)
def test_a_rule_about_labels_says_why_none_was_read(rows_of: Any, rule: Any) -> None:
    assert _outcomes(rows_of([rule]), "one")[2] == "unparsable: no answer sentence"


def test_rules_drop_and_the_first_that_fails_is_named(rows_of: Any) -> None:
    rows = rows_of([MinAgreement(share=0.6), AgreesWithLabel()])
    assert _outcomes(rows)[3:7] == ["kept", *["rule: agrees_with_label"] * 3]
    assert teacher_answers(rows)["two"] == TeacherAnswer("4", ("Right.",), 2 / 3)
    strict = rows_of([MinAgreement(share=0.7)])
    assert set(_outcomes(strict, "one")) == {"rule: min_agreement"}
    assert teacher_answers(strict)["one"] == TeacherAnswer("2", (), 2 / 3)


def test_a_rule_sees_only_what_those_before_it_left(rows_of: Any) -> None:
    texts = TEXTS | {"two": ("Right it is, I think. The answer is 3.", "Wrong. The answer is 4.", "Bad.")}
    assert _outcomes(rows_of([AgreesWithLabel(), Shortest()], texts), "two") == [
        "kept", "rule: agrees_with_label", "unparsable: no answer sentence",
    ]  # fmt: skip
    assert _outcomes(rows_of([Shortest(), AgreesWithLabel()], texts), "two") == [
        "rule: shortest", "rule: agrees_with_label", "rule: shortest",
    ]  # fmt: skip


def test_the_same_text_twice_is_two_rows_and_one_rationale(rows_of: Any) -> None:
    texts = TEXTS | {"one": ("Good. The answer is 2.",) * 3}
    assert _outcomes(rows_of([Dedupe()], texts), "one") == ["kept", "rule: dedupe", "rule: dedupe"]


def test_what_is_missing_has_a_row_and_no_vote(rows_of: Any) -> None:
    """A third of the completions came: two of the two that there are agree."""
    rows = rows_of([Parsable()], TEXTS | {"one": (None, TEXTS["one"][0], TEXTS["one"][1])})
    assert _outcomes(rows, "one") == ["not completed", "kept", "kept"]
    assert (rows[0].agreement, rows[0].teacher_label, rows[0].tokens_in) == (1.0, "2", 0)
    nothing = rows_of([Parsable()], TEXTS | {"one": (None, None, None)})
    assert _outcomes(nothing, "one") == ["not completed"] * 3
    assert teacher_answers(nothing)["one"] == TeacherAnswer(None, (), 0.0)


WRONG = TEXTS | {"two": ("Wrong. The answer is 4.", "Bad. The answer is 4.", "Odd. The answer is 5.")}
HINTED = {"two": ("It is told. The answer is 3.", "Never! The answer is 4.", "Hm.", "The answer is 3.")}


def test_hinted_chains_are_kept_where_they_reach_the_gold_label_and_never_vote(rows_of: Any) -> None:
    rows = rows_of([], WRONG, HINTED)
    own = [row for row in rows if row.example_id == "two"]
    assert [row.hinted for row in own] == [False] * 3 + [True] * 4
    assert _outcomes(own)[3:] == ["kept", "hint not followed", "hint not followed", "no rationale"]
    assert {row.teacher_label for row in own} == {"4"}
    assert [row.agreement for row in own] == [2 / 3] * 3 + [2 / 4] * 4
    assert [row.sample for row in own] == [0, 1, 2, 0, 1, 2, 3]


@pytest.mark.parametrize("rules", [[AgreesWithLabel()], [Majority()], [AgreesWithLabel(), MinAgreement(share=0.5)]])
def test_rules_judge_a_hinted_chain_by_the_gold_label(rows_of: Any, rules: Any) -> None:
    own = [row for row in rows_of(rules, WRONG, HINTED) if row.hinted]
    assert _outcomes(own) == ["kept", "hint not followed", "hint not followed", "no rationale"]
    assert set(_outcomes([row for row in rows_of([MinAgreement(share=0.6)], WRONG, HINTED) if row.hinted])) == {
        "rule: min_agreement", "hint not followed", "no rationale",
    }  # fmt: skip


def test_the_agreement_of_an_answer_is_that_of_the_chains_that_are_learned(rows_of: Any) -> None:
    rows = rows_of([AgreesWithLabel()], WRONG, HINTED)
    assert teacher_answers(rows)["two"] == TeacherAnswer("4", ("It is told.",), 2 / 4)
    assert teacher_answers(rows)["one"] == TeacherAnswer("2", ("Good.", "Fine."), 2 / 3)


def _funnel(rows: Rows, task: Any) -> dict[str, Any]:
    counts = Funnel()
    for id in dict.fromkeys(row.example_id for row in rows):
        counts.count([row for row in rows if row.example_id == id], task)
    return counts.report()


def test_the_funnel_counts_every_completion_once(rows_of: Any, task: Any) -> None:
    assert _funnel(rows_of([AgreesWithLabel()]), task) == {
        "examples": 3,
        "asked": 9,
        "completed": 9,
        "parsed": 7,
        "agreed": 5,  # two of one, one of two, and two of three, whose vote stands for the label that nobody knows
        "kept": 3,
        "kept_hinted": 0,
        "hinted": 0,
        "cut": 0,
        "examples_kept": 2,
        "known": 2,
        "right": 1,
        "tokens_in": 90,
        "tokens_out": 9,
        "dropped": {
            "empty": 1, "no rationale": 1, "rule: agrees_with_label": 3, "unparsable: no answer sentence": 1,
        },
        "accuracy": 0.5,
    }  # fmt: skip


def test_the_funnel_of_hints_and_gaps(rows_of: Any, task: Any) -> None:
    rows = rows_of([Parsable()], WRONG | {"one": (None, None, None)}, HINTED)
    counts = _funnel([replace(row, cut=row.hinted) for row in rows], task)
    assert (counts["asked"], counts["completed"], counts["hinted"], counts["kept_hinted"], counts["cut"]) == (
        13, 10, 4, 1, 4,
    )  # fmt: skip
    assert counts["known"] == 1, "an example that was never answered says nothing of the teacher"
    assert (counts["right"], counts["accuracy"]) == (0, 0.0), "hints make no vote right"
    assert counts["dropped"]["not completed"] == 3
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["asked"]


def test_an_unreadable_example_counts_as_wrong_and_no_gold_label_as_unknown(rows_of: Any, task: Any) -> None:
    rows = rows_of([], dict.fromkeys(TEXTS, ("?", "?", "?")))
    assert (_funnel(rows, task)["accuracy"], _funnel(rows, task)["parsed"]) == (0.0, 0)
    assert _funnel([row for row in rows if row.example_id == "three"], task)["accuracy"] is None
    assert teacher_answers(rows)["one"] == TeacherAnswer(None, ("?", "?", "?"), 0.0)


def _save(path: Path, rows: Rows, scores: Sequence[TokenScores | None] | None = None) -> None:
    with row_writer(path, with_scores=scores is not None) as writer:
        for i, row in enumerate(rows):
            writer.write([row], [scores[i] if scores else None])


def _loaded(path: Path, tmp_path: Path) -> Any:
    from datasets import load_dataset

    return load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))


def test_parquet_gives_the_same_rows_back_here_and_in_datasets(rows_of: Any, tmp_path: Path) -> None:
    path, rows = tmp_path / "train.parquet", rows_of([Parsable()], WRONG, HINTED)
    _save(path, rows)
    assert list(read_rows(path)) == rows
    loaded = _loaded(path, tmp_path)
    assert loaded.num_rows == 13
    assert set(loaded.column_names) == COLUMNS.keys() - {"logprobs"} == set(asdict(rows[0]))
    assert loaded[3]["rationale"] == "Wrong."
    assert loaded[10]["gold_label"] is None
    assert loaded["agreement"][0] == pytest.approx(2 / 3)
    assert loaded["hinted"] == [row.hinted for row in rows]
    types = {"sample": "int64", "tokens_in": "int64", "agreement": "float64", "hinted": "bool", "cut": "bool"}
    assert {name: loaded.features[name].dtype for name in types} == types


def test_columns_that_are_empty_in_all_rows_keep_their_type(rows_of: Any, tmp_path: Path) -> None:
    rows = [replace(row, gold_label=None, teacher_label=None) for row in rows_of()]
    _save(tmp_path / "train.parquet", rows)
    assert list(read_rows(tmp_path / "train.parquet")) == rows
    _save(tmp_path / "none.parquet", [])
    assert list(read_rows(tmp_path / "none.parquet")) == []


def test_many_rows_are_written_and_read_in_parts(rows_of: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("distill_llm.rationales.dataset._ROWS_A_WRITE", 4)
    rows = [replace(row, sample=i) for i, row in enumerate(rows_of() * 3)]
    _save(tmp_path / "train.parquet", rows)
    assert list(read_rows(tmp_path / "train.parquet")) == rows


def test_log_probabilities_are_a_nested_column(rows_of: Any, tmp_path: Path) -> None:
    path, rows = tmp_path / "train.parquet", rows_of()[:3]
    of_ids = TokenScores((7, 9), (-0.5, -1.25), ((7, 3), (9, 4)), ((-0.5, -2.0), (-1.25, -1.5)))
    of_text = TokenScores(("an", "n"), (-0.1, 0.0), ((), ("n",)), ((), (0.0,)))
    _save(path, rows, [of_ids, None, of_text])
    assert list(read_rows(path)) == rows, "who needs no scores does not read them"
    loaded = _loaded(path, tmp_path)
    assert set(loaded.column_names) == set(COLUMNS)
    assert loaded[0]["logprobs"] == [
        {"token": "7", "logprob": -0.5, "top": [{"token": "7", "logprob": -0.5}, {"token": "3", "logprob": -2.0}]},
        {"token": "9", "logprob": -1.25, "top": [{"token": "9", "logprob": -1.25}, {"token": "4", "logprob": -1.5}]},
    ]
    assert loaded[1]["logprobs"] is None
    assert loaded[2]["logprobs"] == [
        {"token": "an", "logprob": -0.1, "top": []},
        {"token": "n", "logprob": 0.0, "top": [{"token": "n", "logprob": 0.0}]},
    ]


def test_an_error_on_the_way_leaves_no_file(rows_of: Any, tmp_path: Path) -> None:
    def write_half() -> None:
        with row_writer(tmp_path / "train.parquet") as writer:
            writer.write(rows_of()[:1], [None])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_version_says_what_to_do(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"example_id": ["a"], "text": ["b"]}), tmp_path / "old.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    for name in ("old", "broken", "gone"):
        with pytest.raises(StorageError, match="without asking the teacher"):
            list(read_rows(tmp_path / f"{name}.parquet"))
