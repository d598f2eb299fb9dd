"""CQA, SVAMP, GSM8K and StrategyQA on rows as the Hub has them, what is wrong in rows, and how answers are read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from distill_llm.core.errors import DataError
from distill_llm.core.example import Example
from distill_llm.tasks.cqa import Cqa
from distill_llm.tasks.gsm8k import Gsm8k
from distill_llm.tasks.strategyqa import StrategyQa
from distill_llm.tasks.svamp import Svamp

if TYPE_CHECKING:
    from pathlib import Path

    from distill_llm.tasks.base import Task

PLAIN = Example(id="0", input="", prompt="")


def first(tmp_path: Path, task: type[Task], row: dict[str, Any]) -> Example:
    (tmp_path / "train.json").write_text(json.dumps([row]))
    return task.model_validate({"data": str(tmp_path)}).read()["train"][0]


def test_svamp_of_the_hub(tmp_path: Path) -> None:
    row = {
        "ID": "chal-1",
        "Body": "A pack costs 76 dollars.",
        "Question": "How much are 2?",
        "Equation": "( 76.0 * 2.0 )",
    }
    example = first(tmp_path, Svamp, row)
    assert (example.id, example.label) == ("chal-1", "( 76.0 * 2.0 )")
    assert example.input == "A pack costs 76 dollars.\nHow much are 2?"
    assert example.prompt == "Q: A pack costs 76 dollars. How much are 2?\nA:"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("(84 / 2).", "( 84.0 / 2.0 )"),
        ("((16 * 17) * 4)", "( ( 16.0 * 17.0 ) * 4.0 )"),
        ("(16 * 17) * 4", "( ( 16.0 * 17.0 ) * 4.0 )"),
        ("(1 + 2) * (3 + 4)", "( ( 1.0 + 2.0 ) * ( 3.0 + 4.0 ) )"),
        ("84 / 2 = 42", "( 84.0 / 2.0 )"),
        ("(8)", "8.0"),
        ("1,000", "1000.0"),
        ("(2 * x)", None),
        ("", None),
    ],
)
def test_svamp_answers_are_spelled_as_in_the_data(text: str, label: str | None) -> None:
    assert Svamp().normalise(text, PLAIN) == label


@pytest.mark.parametrize("label", ["( 84.0 / 2.0 )", "( ( 1.0 + 2.5 ) * 4.0 )", "8.0", "( 1.0 + 2.0 ) * ( 3.0 + 4.0 )"])
def test_svamp_answer_sentence_keeps_the_value(label: str) -> None:
    sentence = Svamp().answer_sentence(label, PLAIN)
    assert sentence.startswith("The answer is (")
    assert sentence.endswith(").")
    assert Svamp().same(sentence.removeprefix("The answer is "), label)


def test_gsm8k_row(tmp_path: Path) -> None:
    example = first(
        tmp_path, Gsm8k, {"question": "How many?", "answer": "She has 2*540=<<2*540=1080>>1080.\n#### 1,080"}
    )
    assert (example.label, example.rationale) == ("1080", "She has 2*540=1080.")
    with pytest.raises(DataError, match=r"train\.json, row 1: the field 'answer' ends in 'no mark 5'\. Expected steps"):
        first(tmp_path, Gsm8k, {"question": "How many?", "answer": "no mark 5"})
    assert first(tmp_path, Gsm8k, {"question": "How many?"}).label is None


@pytest.mark.parametrize(
    ("text", "label"), [("$1,080.00", "1080"), ("18 eggs", "18"), ("-3", "-3"), ("1/2", "0.5"), ("x", None)]
)
def test_gsm8k_answers_are_plain_numbers(text: str, label: str | None) -> None:
    assert Gsm8k().normalise(text, PLAIN) == label


@pytest.mark.parametrize("facts", [["Ice is  cold", "Fire is hot."], "Ice is cold. Fire is hot."])
def test_strategyqa_row(tmp_path: Path, facts: object) -> None:
    example = first(tmp_path, StrategyQa, {"qid": "q1", "question": "Is ice hot?", "answer": False, "facts": facts})
    assert (example.id, example.label, example.rationale) == ("q1", "no", "Ice is cold. Fire is hot.")
    with pytest.raises(DataError, match=r"row 1: the field 'answer' is 'maybe'\. Expected true or false"):
        first(tmp_path, StrategyQa, {"question": "Is ice hot?", "answer": "maybe"})


@pytest.mark.parametrize(
    ("text", "label"),
    [("yes", "yes"), ("No, it is not", "no"), ('"True"', "yes"), ("false", "no"), ("nothing", None), ("not yes", None)],
)
def test_strategyqa_answers(text: str, label: str | None) -> None:
    assert StrategyQa().normalise(text, PLAIN) == label


def test_cqa_row_must_have_choices(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1: the field 'choices' is missing; the row has \['id', 'question'\]"):
        first(tmp_path, Cqa, {"id": "1", "question": "Where?"})


def test_cqa_reading() -> None:
    example = Example(id="1", input="", prompt="", choices=("ankara", "istanbul"))
    assert Cqa().normalise("(b) Istanbul.", example) is None
    assert Cqa(reading="lenient").normalise("(b) Istanbul.", example) == "istanbul"
