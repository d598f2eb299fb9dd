"""What is found out before a teacher is asked: its limits, and answers that its prompt would give away."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill_llm.core.errors import ConfigError, DataError
from distill_llm.pipeline.preview import preview_rationales
from distill_llm.pipeline.rationale_checks import without_exemplars
from distill_llm.pipeline.rationale_stage import check, load_examples
from distill_llm.pipeline.run import generate_rationales
from distill_llm.rationales.prompts import make_prompter

# The splits of the recipe ``even``: train has 0 to 11, validation 12 to 15, test 16 to 19.


@pytest.fixture
def shown(tmp_path: Path) -> Any:
    """Overrides with which the prompt shows these numbers worked out."""

    def write(*numbers: int) -> list[str]:
        question = '- {{question: " Is  {} even ?", rationale: r, answer: "The answer is yes."}}\n'
        (tmp_path / "shown.yaml").write_text("".join(question.format(number) for number in numbers))
        return [f"rationales.prompt.exemplars={tmp_path / 'shown.yaml'}"]

    return write


@pytest.mark.parametrize(("number", "split"), [(3, "train"), (13, "validation"), (17, "test")])
def test_an_exemplar_from_the_data_is_refused(even: Any, shown: Any, number: int, split: str) -> None:
    """However it is spelt: case and space make no other question."""
    with pytest.raises(DataError) as caught:
        check(even(*shown(99, number)))
    assert f"1 of the exemplars' questions are also in the {split} split, such as example '{split}-{number}'" in str(
        caught.value
    )
    assert ("task.overlap=drop" in str(caught.value)) == (split != "test")
    assert not even().folder.exists()


def test_examples_that_are_shown_can_be_left_out(even: Any, shown: Any) -> None:
    splits = check(even(*shown(99, 3, 5, 13), "task.overlap=drop"))
    assert [example.id for example in splits.train] == [f"train-{n}" for n in (0, 1, 2, 4, *range(6, 12))]
    assert [example.id for example in splits.validation] == ["validation-12", "validation-14", "validation-15"]
    assert (len(splits.test), splits.dropped) == (4, 3)


def test_a_test_example_is_never_left_out(even: Any, shown: Any) -> None:
    """Another prompt would then be scored on another test set."""
    with pytest.raises(DataError, match=r"in the test split.*Choose other exemplars\.$"):
        load_examples(even(*shown(17), "task.overlap=drop"))


@pytest.mark.parametrize("change", [{"prompt": "worded otherwise"}, {"input": "worded otherwise"}])
def test_an_exemplar_is_known_by_what_teacher_or_student_reads(even: Any, shown: Any, change: dict[str, str]) -> None:
    splits = check(even())
    splits = replace(splits, train=tuple(replace(example, **change) for example in splits.train))
    recipe = even(*shown(3))
    exemplars = make_prompter(recipe.rationales.prompt).exemplars
    with pytest.raises(DataError, match=r"here: .* such as example 'train-3'"):
        without_exemplars(exemplars, splits, overlap="refuse", where="here")


def test_a_split_of_exemplars_alone_is_refused(even: Any, shown: Any) -> None:
    with pytest.raises(DataError, match="nothing is left of a split without the exemplars"):
        load_examples(even(*shown(12, 13, 14, 15), "task.overlap=drop"))


def test_only_exemplars_that_are_in_the_prompt_count(even: Any, shown: Any) -> None:
    assert check(even(*shown(99, 3), "rationales.prompt.num_exemplars=1")).dropped == 0
    assert check(even(*shown(99))).dropped == 0


def test_a_prompt_that_is_too_long_is_named_before_anything_is_written(teach: Any, even: Any) -> None:
    teacher = teach(max_prompt_tokens=5)
    with pytest.raises(
        DataError, match=r"has 6 tokens, but the teacher takes 5 beside its answer"
    ):  # Q: is 0 even ? A:
        generate_rationales(even())
    assert teacher.asked == []
    assert not even().folder.exists()


def _words(even: Any, *overrides: str) -> int:
    return preview_rationales(even(*overrides)).tokens_a_request[2]


def test_the_longest_prompt_decides(teach: Any, even: Any, shown: Any) -> None:
    teach(max_prompt_tokens=1000)
    plain, with_exemplars = _words(even), _words(even, *shown(98, 99))
    assert plain < with_exemplars
    teacher = teach(max_prompt_tokens=plain)
    generate_rationales(even())
    with pytest.raises(DataError) as caught:
        generate_rationales(even(*shown(98, 99), "run_dir=never"))
    message = str(caught.value)
    assert re.search(rf"the prompt of example '(train|test)-\d+' \((train|test)\) has {with_exemplars} tokens", message)
    assert f"takes {plain} beside its answer" in message
    assert "fewer exemplars (rationales.prompt.num_exemplars, now 2)" in message
    assert (len(teacher.asked), Path("never").exists()) == (16, False)


def test_one_long_example_among_many_is_found(teach: Any, even: Any, tmp_path: Path) -> None:
    teacher = teach(max_prompt_tokens=20)
    recipe = even(train=200)
    rows = (tmp_path / "data" / "train.jsonl").read_text().split("\n")
    rows[150] = rows[150].replace("even", "even " + "and so on " * 20)
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"example 'train-150' \(train\) has 66 tokens.*takes 20") as caught:
        check(recipe)
    assert "exemplars" not in str(caught.value), "there are none to take fewer of"
    assert teacher.asked == []


def test_what_a_rule_needs_is_looked_for_before_a_teacher_is_asked(teach: Any, even: Any, tmp_path: Path) -> None:
    teacher = teach()
    rule = f"rationales.keep=[{{kind: max_rationale_tokens, tokens: 9, tokenizer: {tmp_path / 'gone'}}}]"
    with pytest.raises(ConfigError, match=r"rationales\.keep: max_rationale_tokens\.tokenizer"):
        generate_rationales(even(rule))
    assert teacher.asked == []
    assert not even().folder.exists()


def test_a_teacher_that_is_not_asked_about_test_is_not_checked_with_it(teach: Any, even: Any, tmp_path: Path) -> None:
    teach(max_prompt_tokens=10)
    recipe = even("evaluate.teacher=false")
    rows = (tmp_path / "data" / "test.jsonl").read_text().replace("even", "even " + "and so on " * 20)
    (tmp_path / "data" / "test.jsonl").write_text(rows)
    assert len(check(recipe).test) == 4
