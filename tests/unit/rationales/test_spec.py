"""The rationale section: what is refused, and what its fingerprint hangs on."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from distill_llm.rationales.keep import Parsable
from distill_llm.rationales.spec import RationaleSpec

COMPUTES = {"kind": "openai_compatible", "model": "m"}


def _spec(**changes: Any) -> RationaleSpec:
    return RationaleSpec.model_validate({"teacher": {"kind": "gold"}} | changes)


def test_many_greedy_samples_are_refused() -> None:
    with pytest.raises(ValidationError, match="4 times the same greedy text"):
        _spec(teacher=COMPUTES, samples=4)
    with pytest.raises(ValidationError, match=r"hint_retry\.samples above 1 needs a sampling\.temperature"):
        _spec(teacher=COMPUTES, hint_retry={"samples": 2})
    hot = _spec(teacher=COMPUTES, samples=4, sampling={"temperature": 0.7}, hint_retry={"samples": 2})
    assert hot.samples == 4


def test_texts_that_are_there_already_may_be_many_without_a_temperature() -> None:
    """Nobody draws them now: temperature says nothing of them."""
    assert _spec(teacher={"kind": "replay", "data": "texts.jsonl"}, samples=4).samples == 4


def test_a_limit_of_cost_needs_prices() -> None:
    with pytest.raises(ValidationError, match=r"budget\.max_cost needs `prices`"):
        _spec(budget={"max_cost": 1})
    assert _spec(budget={"max_cost": 1}, prices={"output_per_million": 2}).budget.max_cost == 1


def test_what_can_be_read_is_kept_if_nothing_else_is_said() -> None:
    assert _spec().keep == (Parsable(),)
    assert _spec(keep=[]).keep == ()


BASE: dict[str, Any] = {"teacher": COMPUTES}


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": COMPUTES | {"model": "n"}},
        {"teacher": {"kind": "gold"}},
        {"prompt": {"template": "{prompt}!"}},
        {"sampling": {"max_new_tokens": 9}},
        {"samples": 2, "sampling": {"temperature": 0.5}},
        {"hint_retry": {}},
        {"keep": []},
        {"keep": [{"kind": "parsable"}, {"kind": "dedupe"}]},
    ],
)
def test_the_fingerprint_changes_with_what_decides_the_data_set(changes: dict[str, Any]) -> None:
    assert _spec(**BASE | changes).fingerprint != _spec(**BASE).fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": {"max_requests": 9}},
        {"prices": {"input_per_million": 1}},
        {"allow_missing": 0.5},
        {"keep": [{"kind": "parsable"}]},  # what is so anyway
    ],
)
def test_the_fingerprint_does_not_change_with_how_far_one_asks(changes: dict[str, Any]) -> None:
    assert _spec(**BASE | changes).fingerprint == _spec(**BASE).fingerprint


def test_the_fingerprint_does_not_change_with_how_a_teacher_is_asked() -> None:
    teacher = _spec(**BASE).teacher
    assert teacher.manner, "this kind has such fields"
    assert teacher.manner <= type(teacher).model_fields.keys()
    for name in sorted(teacher.manner):
        value = getattr(teacher, name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            other = _spec(teacher=COMPUTES | {name: value + 1})
            assert other.teacher != teacher
            assert other.fingerprint == _spec(**BASE).fingerprint, name
