"""Which choice an answer names, and how choices and answers are worded."""

from __future__ import annotations

import re

import pytest

from distill_llm.tasks.base import chosen, lettered
from distill_llm.tasks.wording import SHORT_ANSWER, STATED_ANSWER, lettered_answer, with_choices

CHOICES = ("train", "St. Louis", "a ledge", "Train station", "train")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("(a) train.", "train"),
        ("(d) train", "train"),  # the letter is wrong: the text decides
        ("train", "train"),
        ("TRAIN.", "train"),
        ("(b) St. Louis.", "St. Louis"),
        ("b) st. louis", "St. Louis"),
        ("B. St. Louis", "St. Louis"),
        ("a ledge", "a ledge"),
        ('"a ledge".', "a ledge"),
        ("(c)", "a ledge"),
        ("(C).", "a ledge"),
        ("c", "a ledge"),
        ("D.", "Train station"),
        ("(c) the ledge", None),
        ("either (a) train or (b) St. Louis.", None),
        ("(a) train or (b) St. Louis", None),
        ("(f)", None),
        ("z", None),
        ("", None),
        (".", None),
        ("none of these", None),
    ],
)
def test_choice_is_named_by_text_then_by_letter(text: str, choice: str | None) -> None:
    assert chosen(text, CHOICES) == choice


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("(b) Istanbul.", None),
        ("(b) istanbul.", "istanbul"),
        ("(b)", "istanbul"),
        ("Washington D.C.", "Washington D.C."),
    ],
)
def test_choice_letter_for_letter(text: str, choice: str | None) -> None:
    assert chosen(text, ("ankara", "istanbul", "Washington D.C."), match_case=True) == choice


def test_letter_picks_among_choices_of_equal_text() -> None:
    assert chosen("(b) POLISH", ("polish", "Polish")) == "Polish"
    assert chosen("(a) Polish", ("polish", "Polish")) == "Polish"
    assert chosen("b", ("b", "a")) == "b"


def test_choices_are_worded_with_letters() -> None:
    assert lettered(["x", "y"]) == "(a) x\n(b) y"
    assert with_choices("Which?", ["x", "y"]) == "Which?\nAnswer Choices:\n(a) x\n(b) y"
    assert lettered_answer("y", ["x", "y"]) == "So the answer is (b) y."
    assert lettered_answer("Y", ["x", "y"]) == "So the answer is (b) Y."
    assert lettered_answer("z", ["x", "y"]) == "So the answer is z."


@pytest.mark.parametrize(
    ("text", "rationale", "stated"),
    [
        ("It rains. So the answer is (b) wet.", "It rains. ", "(b) wet."),
        ("It rains. Therefore, the answer is: wet", "It rains. ", "wet"),
        ("The answer is dry. But it rains. The answer is wet.", "The answer is dry. But it rains. ", "wet."),
        ("1 + 1 = 2\n#### 2", "1 + 1 = 2\n", "2"),
        ("So the answer is (b) St. Louis.\nMore text", "", "(b) St. Louis."),
        ("So the answer is one of these four.", None, None),
        ("It rains.", None, None),
    ],
)
def test_answer_sentence_is_found(text: str, rationale: str | None, stated: str | None) -> None:
    found = list(re.finditer(STATED_ANSWER, text))
    if stated is None:
        assert not found
    else:
        assert (text[: found[-1].start()], found[-1][1]) == (rationale, stated)


def test_short_answer_ends_with_its_sentence() -> None:
    assert re.findall(SHORT_ANSWER, "The answer is $3.50. There are 7 days.") == ["$3.50"]
    assert re.findall(SHORT_ANSWER, "The answer is yes!") == ["yes"]


@pytest.mark.parametrize("pattern", [STATED_ANSWER, SHORT_ANSWER])
def test_patterns_take_no_time_on_long_text(pattern: str) -> None:
    assert len(re.findall(pattern, "The answer is " * 2000 + "x")) == 1
    assert not re.findall(pattern, "the answer " * 5000)
