"""Prompts: exemplars, question and hint, as one text or as the turns of a chat."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from distill_llm.core.errors import ConfigError
from distill_llm.core.example import Example
from distill_llm.rationales.prompts import HintSpec, make_prompter, prompt_text
from distill_llm.tasks.wording import bare_question, few_shot, reworded
from distill_llm.teachers.base import Message
from distill_llm.teachers.prompt import PromptSpec

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLE = Example(id="1", input="1 + 1 ?", prompt="Q: 1 + 1 ?\nA:")
BARE = Example(id="2", input="who pays ?", prompt="who pays ?")
EXEMPLARS = """
- {question: "2 + 2 ?", rationale: "Two and two is four.", answer: "The answer is 4."}
- {question: "3 + 3 ?", rationale: "Three and three is six.", answer: "The answer is 6."}
"""


@pytest.fixture
def exemplars(tmp_path: Path) -> str:
    (tmp_path / "mine.yaml").write_text(EXEMPLARS)
    return str(tmp_path / "mine.yaml")


def test_a_text_is_exemplars_and_then_the_question(exemplars: str) -> None:
    two = make_prompter(PromptSpec(exemplars=exemplars)).render(EXAMPLE)
    assert two == (
        "Q: 2 + 2 ?\nA: Two and two is four. The answer is 4.\n\n"
        "Q: 3 + 3 ?\nA: Three and three is six. The answer is 6.\n\n"
        "Q: 1 + 1 ?\nA:"
    )
    one = make_prompter(PromptSpec(exemplars=exemplars, num_exemplars=1)).render(EXAMPLE)
    assert one == "Q: 2 + 2 ?\nA: Two and two is four. The answer is 4.\n\nQ: 1 + 1 ?\nA:"
    assert make_prompter(PromptSpec()).render(EXAMPLE) == EXAMPLE.prompt


def test_a_chat_has_the_same_in_turns_without_the_frame_of_a_text(exemplars: str) -> None:
    spec = PromptSpec(style="chat", system="End with: The answer is ...", exemplars=exemplars, num_exemplars=1)
    assert make_prompter(spec).render(EXAMPLE) == (
        Message("system", "End with: The answer is ..."),
        Message("user", "2 + 2 ?"),
        Message("assistant", "Two and two is four. The answer is 4."),
        Message("user", "1 + 1 ?"),
    )
    assert make_prompter(PromptSpec(style="chat")).render(EXAMPLE) == (Message("user", "1 + 1 ?"),)
    assert make_prompter(PromptSpec(style="chat")).render(BARE) == (Message("user", "who pays ?"),)


def test_a_template_stands_around_the_question_and_takes_braces_as_they_are() -> None:
    text = make_prompter(PromptSpec(template="<{x}> {prompt} {y}")).render(EXAMPLE)
    assert text == f"<{{x}}> {EXAMPLE.prompt} {{y}}"
    chat = make_prompter(PromptSpec(template="Think. {prompt}", style="chat")).render(EXAMPLE)
    assert chat == (Message("user", "Think. 1 + 1 ?"),)
    with pytest.raises(ValidationError, match=r"must contain \{prompt\}"):
        PromptSpec(template="no question")


def test_a_system_message_needs_a_chat() -> None:
    with pytest.raises(ValidationError, match="set style: chat, or put the text into `template`"):
        PromptSpec(system="Be brief.")


@pytest.mark.parametrize("style", ["text", "chat"])
def test_the_fingerprint_changes_with_each_part(tmp_path: Path, exemplars: str, style: str) -> None:
    def of(**changes: Any) -> str:
        return make_prompter(PromptSpec.model_validate({"style": style, "exemplars": exemplars} | changes)).fingerprint

    changes: list[dict[str, Any]] = [
        {},
        {"exemplars": ""},
        {"num_exemplars": 1},
        {"template": "{prompt} "},
        {"style": {"text": "chat", "chat": "text"}[style]},
    ]
    if style == "chat":
        changes += [{"system": "a"}, {"system": "b"}]
    found = [of(**change) for change in changes]
    for word in ("2 + 2", "Two and two", "The answer is 4"):
        (tmp_path / "mine.yaml").write_text(EXEMPLARS.replace(word, f"{word} "))
        found.append(of())
    assert len(set(found)) == len(found)


def test_the_fingerprint_does_not_change_with_the_name_of_the_file(tmp_path: Path, exemplars: str) -> None:
    (tmp_path / "copy.yaml").write_text(EXEMPLARS)
    names = (exemplars, str(tmp_path / "copy.yaml"))
    assert len({make_prompter(PromptSpec(exemplars=name)).fingerprint for name in names}) == 1


def test_a_hint_stands_inside_the_frame(exemplars: str) -> None:
    """Behind the frame the teacher would take it for the beginning of its answer."""
    hint = "1 + 1 ?\n(Hint: The answer is 2.)"
    text = make_prompter(PromptSpec(exemplars=exemplars, num_exemplars=1, template="<{prompt}")).render(EXAMPLE, hint)
    assert text == ("Q: 2 + 2 ?\nA: Two and two is four. The answer is 4.\n\n<Q: 1 + 1 ?\n(Hint: The answer is 2.)\nA:")
    chat = make_prompter(PromptSpec(style="chat")).render(EXAMPLE, hint)
    assert chat == (Message("user", hint),)


@pytest.mark.parametrize("style", ["text", "chat"])
def test_a_hint_for_a_bare_prompt_has_no_frame(style: Any) -> None:
    prompt = make_prompter(PromptSpec(style=style)).render(BARE, "who pays ?\n(Hint: so ann)")
    hint = "who pays ?\n(Hint: so ann)"
    assert prompt == (hint if style == "text" else (Message("user", hint),))


def test_a_hint_changes_what_is_the_example_s_own() -> None:
    prompter = make_prompter(PromptSpec())
    assert prompter.question(EXAMPLE) == EXAMPLE.prompt
    assert prompter.question(EXAMPLE, "other ?") == "Q: other ?\nA:"
    assert prompter.question(replace(EXAMPLE, prompt="Q: x\nA:")) != prompter.question(EXAMPLE)


@pytest.mark.parametrize("template", ["{question}", "{answer}", "none"])
def test_a_hint_s_template_has_question_and_answer(template: str) -> None:
    with pytest.raises(ValidationError, match=r"must contain \{question\} and \{answer\}"):
        HintSpec(template=template)


@pytest.mark.parametrize("question", ["1 + 1 ?", "two\nlines", "Q: in it\nA: too", ""])
def test_frames_are_put_on_and_taken_off(question: str) -> None:
    assert bare_question(few_shot(question)) == question
    assert reworded(few_shot("old"), question) == few_shot(question)
    assert reworded("a bare old one", question) == question


def test_a_prompt_is_shown_with_who_speaks() -> None:
    assert prompt_text("Q: a\nA:") == "Q: a\nA:"
    assert prompt_text((Message("system", "s"), Message("user", "a\nb"))) == "[system]\ns\n[user]\na\nb"


def test_exemplars_that_came_with_the_package_are_found_by_name() -> None:
    head = make_prompter(PromptSpec(exemplars="gsm8k", num_exemplars=2)).head
    assert isinstance(head, str)
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
