"""Prompts, parsing, voting and keeping: from an example to a prompt, from raw text to what a student learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from distill_llm.core.answers import same_answer
from distill_llm.core.component import kinds
from distill_llm.core.errors import ConfigError
from distill_llm.core.example import Example
from distill_llm.rationales.keep import AgreesWithLabel, AgreesWithVote, Chain, Keep, MinAgreement
from distill_llm.rationales.parse import Parsed, cut_run_on, parse
from distill_llm.rationales.prompts import PromptSpec, make_prompter
from distill_llm.rationales.spec import RationaleSpec
from distill_llm.rationales.vote import vote
from distill_llm.tasks.jsonl import Jsonl

if TYPE_CHECKING:
    from pathlib import Path

TASK = Jsonl.model_validate({"data": "nowhere.jsonl", "fields": {"input": ["q"]}})
CHOICE_TASK = Jsonl.model_validate({"data": "nowhere.jsonl", "fields": {"input": ["q"]}, "choices": ["yes", "no"]})
EXAMPLE = Example(id="1", input="1 + 1 ?", prompt="Q: 1 + 1 ?\nA:")
CHOICES = Example(id="2", input="2 > 1 ?", prompt="", choices=("yes", "no"))
EXEMPLARS = """
- {question: "2 + 2 ?", rationale: "Two and two is four.", answer: "The answer is 4."}
- {question: "3 + 3 ?", rationale: "Three and three is six.", answer: "The answer is 6."}
"""


def _same(first: str, second: str) -> bool:
    return same_answer("text", first, second)


def test_a_prompt_is_exemplars_and_then_the_question(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(EXEMPLARS)
    two = make_prompter(PromptSpec(exemplars=str(path))).render(EXAMPLE)
    assert two == (
        "Q: 2 + 2 ?\nA: Two and two is four. The answer is 4.\n\n"
        "Q: 3 + 3 ?\nA: Three and three is six. The answer is 6.\n\n"
        "Q: 1 + 1 ?\nA:"
    )
    one = make_prompter(PromptSpec(exemplars=str(path), num_exemplars=1)).render(EXAMPLE)
    assert one == "Q: 2 + 2 ?\nA: Two and two is four. The answer is 4.\n\nQ: 1 + 1 ?\nA:"
    assert make_prompter(PromptSpec()).render(EXAMPLE) == EXAMPLE.prompt


def test_a_template_stands_around_the_question_and_takes_braces_as_they_are() -> None:
    prompter = make_prompter(PromptSpec(template="<{x}> {prompt} {y}"))
    assert prompter.render(EXAMPLE) == f"<{{x}}> {EXAMPLE.prompt} {{y}}"
    with pytest.raises(ValidationError, match=r"must contain \{prompt\}"):
        PromptSpec(template="no question")


def test_exemplars_that_came_with_the_package_are_found_by_name() -> None:
    head = make_prompter(PromptSpec(exemplars="gsm8k", num_exemplars=2)).head
    assert head.count("Q: ") == 2
    assert head.endswith("\n\n")


@pytest.mark.parametrize("text", ["- {question: a, rationale: b}", "just text", "[]", "- {question: [", "{}"])
def test_wrong_exemplars_are_config_errors(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"rationales\.prompt\.exemplars"):
        make_prompter(PromptSpec(exemplars=str(path)))
    with pytest.raises(ConfigError, match="no such file"):
        make_prompter(PromptSpec(exemplars="no-such-name"))


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


def _chain(**changes: Any) -> Chain:
    facts: dict[str, Any] = {
        "rationale": "r", "label": "a", "voted_label": "a", "agreement": 0.75, "gold_label": "a", "same": _same,
    }  # fmt: skip
    return Chain(**(facts | changes))


def test_keep_rules() -> None:
    assert AgreesWithLabel().keeps(_chain(gold_label="A ", voted_label="b"))
    assert not AgreesWithLabel().keeps(_chain(gold_label="b"))
    assert not AgreesWithLabel().keeps(_chain(gold_label=None)), "without a gold label nobody can know"
    assert AgreesWithVote().keeps(_chain(gold_label="b"))
    assert not AgreesWithVote().keeps(_chain(voted_label="b"))
    assert MinAgreement(share=0.75).keeps(_chain())
    assert not MinAgreement(share=0.76).keeps(_chain())
    assert set(kinds(Keep, "distill_llm.rationales")) == {"agrees_with_label", "agrees_with_vote", "min_agreement"}


def test_many_greedy_samples_are_refused() -> None:
    with pytest.raises(ValidationError, match="times the same greedy text"):
        RationaleSpec.model_validate({"teacher": {"kind": "gold"}, "samples": 4})
    spec = {"teacher": {"kind": "gold"}, "samples": 4, "sampling": {"temperature": 0.7}}
    assert RationaleSpec.model_validate(spec).samples == 4
