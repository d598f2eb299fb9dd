"""The data's own rationales as a teacher, and what a teacher's answer is made of."""

from __future__ import annotations

from itertools import count, islice
from typing import TYPE_CHECKING, Any

import pytest

from distill_llm.core.errors import ConfigError, TeacherError
from distill_llm.core.example import Example
from distill_llm.rationales.parse import Parsed, parse
from distill_llm.tasks.jsonl import Jsonl
from distill_llm.teachers.base import Completion, Request, Sampling, TeacherFacts
from distill_llm.teachers.gold import Gold

if TYPE_CHECKING:
    from collections.abc import Sequence

TASK = Jsonl.model_validate({"data": "nowhere.jsonl", "fields": {"input": ["q"]}})


def _request(number: int, **example: Any) -> Request:
    facts: dict[str, Any] = {"id": f"e{number}", "input": "", "prompt": "", "origin": "train", "row": number}
    return Request(f"{number:x}", Example(**(facts | example)), "train", 0, "")


def _texts(teacher: Any, requests: Sequence[Request]) -> list[str]:
    found = {request.key: completion.text for request, completion in teacher.complete(requests)}
    return [found[request.key] for request in requests]


def test_gold_is_the_datas_rationale_and_an_answer_that_is_read_back() -> None:
    teacher = Gold().open(task=TASK, sampling=Sampling(), seed=0)
    request = _request(0, rationale="One and one is two.", label="2")
    assert _texts(teacher, [request]) == ["One and one is two. The answer is 2."]
    assert parse(_texts(teacher, [request])[0], TASK, request.example) == Parsed("One and one is two.", "2")


@pytest.mark.parametrize(("known", "missing"), [({"label": "2"}, "rationale"), ({"rationale": "r"}, "label")])
def test_gold_without_gold_says_what_is_missing(known: dict[str, str], missing: str) -> None:
    teacher = Gold().open(task=TASK, sampling=Sampling(), seed=0)
    with pytest.raises(TeacherError, match=f"example 'e7' has no {missing}"):
        _texts(teacher, [_request(7, **known)])


def test_gold_takes_no_more_requests_than_it_has_answered() -> None:
    """A budget may end them at any time."""
    teacher = Gold().open(task=TASK, sampling=Sampling(), seed=0)
    endless = (_request(number, rationale="r", label=str(number)) for number in count())
    first = list(islice(teacher.complete(endless), 2))
    assert [result for _, result in first] == [Completion("r The answer is 0."), Completion("r The answer is 1.")]
    assert next(endless).example.id == "e2"


def test_gold_has_no_log_probabilities() -> None:
    Gold().check(chat=True, sampling=Sampling())
    with pytest.raises(ConfigError, match=r"rationales\.sampling\.top_logprobs: .*kind gold.* Set it to 0"):
        Gold().check(chat=False, sampling=Sampling(top_logprobs=1))


def test_a_licence_of_the_recipe_is_told() -> None:
    assert Gold(licence="cc-by-4.0").describe() == TeacherFacts("gold", licence="cc-by-4.0")


def test_a_completion_needs_no_token_counts() -> None:
    assert Completion("text") == Completion("text", 0, 0)
