"""Parsing and voting: from raw text to a rationale and a label."""

from __future__ import annotations

import pytest

from distill_llm.core.answers import same_answer
from distill_llm.core.example import Example
from distill_llm.rationales.parse import Parsed, cut_run_on, parse
from distill_llm.rationales.vote import vote
from distill_llm.tasks.jsonl import Jsonl

TASK = Jsonl.model_validate({"data": "nowhere.jsonl", "fields": {"input": ["q"]}})
CHOICE_TASK = Jsonl.model_validate({"data": "nowhere.jsonl", "fields": {"input": ["q"]}, "choices": ["yes", "no"]})
EXAMPLE = Example(id="1", input="1 + 1 ?", prompt="Q: 1 + 1 ?\nA:")
CHOICES = Example(id="2", input="2 > 1 ?", prompt="", choices=("yes", "no"))


def _same(first: str, second: str) -> bool:
    return same_answer("text", first, second)


@pytest.mark.parametrize(
    ("text", "rationale", "label"),
    [
        ("One and one is two. The answer is 2.", "One and one is two.", "2"),
        ("One and one.\nSo the answer is 2", "One and one.", "2"),
        ("First the answer is 3. No: think again. The answer is 2.", "First the answer is 3. No: think again.", "2"),
        ("Two. The answer is 2.\n\nQ: 2 + 2 ?\nA: Four. The answer is 4.", "Two.", "2"),
        ("Two. The answer is 2.\nQuestion: 5 ?\nThe answer is 5.", "Two.", "2"),
    ],
)
def test_the_rationale_stands_before_the_last_answer_of_the_first_question(
    text: str, rationale: str, label: str
) -> None:
    assert parse(text, TASK, EXAMPLE) == Parsed(rationale, label)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Parsed("", None, "empty")),
        ("  \n Q: what ?", Parsed("", None, "empty")),
        ("I do not know.", Parsed("I do not know.", None, "no answer sentence")),
        ("Hm. The answer is maybe.", Parsed("Hm.", None, "answer is not a label")),
        ("The answer is yes.", Parsed("", "yes", "no rationale")),
    ],
)
def test_what_cannot_be_read_says_why(text: str, expected: Parsed) -> None:
    assert parse(text, CHOICE_TASK, CHOICES) == expected


def test_run_on_text_is_cut_at_the_next_question_only() -> None:
    assert cut_run_on(" a Q: b \n\n Q: c") == "a Q: b"
    assert cut_run_on("Q: at the start stays") == "Q: at the start stays"


def test_the_majority_wins_with_its_share_of_all_completions() -> None:
    answers = [Parsed("r", label) for label in ("a", "b", "B ", None, "b")]
    assert vote(answers, _same) == ("b", 3 / 5)


def test_the_earliest_wins_a_tie_and_nothing_wins_nothing() -> None:
    assert vote([Parsed("r", label) for label in ("b", "a", "a", "b")], _same) == ("b", 0.5)
    assert vote([Parsed("r", label) for label in (None, "a", "b", "b", "a")], _same) == ("a", 0.4)
    assert vote([Parsed("", None), Parsed("", None)], _same) == (None, 0.0)
