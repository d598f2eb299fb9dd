"""What every kind of every plug-in base keeps, so that a new file in its folder is all that a new kind needs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from distill_llm.cache.payload import Payload
from distill_llm.core.answers import AnswerKind
from distill_llm.core.component import Component, kinds
from distill_llm.core.example import TARGETS, Example
from distill_llm.core.signals import Signals
from distill_llm.losses.base import Loss
from distill_llm.losses.layers import FeatureLoss
from distill_llm.rationales.keep import Chain, Keep
from distill_llm.rationales.parse import parse
from distill_llm.recipe.recipe import Recipe
from distill_llm.schemes.base import Scheme
from distill_llm.tasks.base import Task
from distill_llm.teachers.base import TensorTeacherSpec, TextTeacherSpec

ROOT = Path(__file__).resolve().parents[2]
BASES: dict[type[Component], str] = {
    Loss: "distill_llm.losses",
    FeatureLoss: "distill_llm.losses",
    Task: "distill_llm.tasks",
    TextTeacherSpec: "distill_llm.teachers",
    TensorTeacherSpec: "distill_llm.teachers",
    Scheme: "distill_llm.schemes",
    Payload: "distill_llm.cache",
    Keep: "distill_llm.rationales",
}
ONE_A_FILE = (Loss, FeatureLoss, Task, TextTeacherSpec, TensorTeacherSpec, Scheme, Payload)

COMPONENTS = [(base, kind, cls) for base, package in BASES.items() for kind, cls in kinds(base, package).items()]
LOSSES, TASKS, KEEPS = (kinds(base, BASES[base]) for base in (Loss, Task, Keep))

# What a kind needs besides its defaults.
REQUIRED: dict[str, dict[str, Any]] = {
    "jsonl": {"data": "rows.jsonl", "fields": {"input": "question"}},
    "min_agreement": {"share": 0.5},
    "max_rationale_tokens": {"tokens": 2},
    "openai_compatible": {"model": "m"},
    "replay": {"files": {"train": "texts.json"}},
    "several": {"of": {"one": {"teacher": {"kind": "gold"}}}},
    "transformers": {"model": "a/b"},
    "vllm": {"model": "a/b"},
    "frozen": {"model": "a/b"},
    "ensemble": {"of": ["a", "b"]},
    "cached": {"of": "a"},
    "assistant_chain": {"teacher": "a"},
}
every_component = pytest.mark.parametrize(("base", "kind", "cls"), COMPONENTS, ids=str)
every_loss = pytest.mark.parametrize("cls", LOSSES.values(), ids=LOSSES.keys())


def _made(cls: type[Any]) -> Any:
    return cls.model_validate(REQUIRED.get(cls.model_fields["kind"].default, {}))


def test_every_base_has_kinds() -> None:
    assert {base for base, _, _ in COMPONENTS} == set(BASES)


@every_component
def test_kind_is_a_literal_of_one_word(base: type[Component], kind: str, cls: type[Any]) -> None:
    assert get_args(cls.model_fields["kind"].annotation) == (kind,)
    assert kind.replace("_", "").isalnum()
    assert kind == kind.lower()


@every_component
def test_is_documented(base: type[Component], kind: str, cls: type[Any]) -> None:
    assert (cls.__doc__ or "").strip().endswith((".", "``")), f"{cls} needs a docstring: the schema shows it in editors"


@every_component
def test_is_frozen_and_knows_its_keys(base: type[Component], kind: str, cls: type[Any]) -> None:
    made = _made(cls)
    with pytest.raises(ValidationError, match="frozen"):
        made.kind = "other"
    with pytest.raises(ValidationError, match="extra_forbidden"):
        cls.model_validate(REQUIRED.get(kind, {}) | {"no_such_key": 1})
    assert made == cls.model_validate(json.loads(made.model_dump_json()))


@every_component
def test_is_in_the_recipe_s_schema(base: type[Component], kind: str, cls: type[Any]) -> None:
    assert Recipe.model_json_schema()["$defs"][cls.__name__]["properties"]["kind"]["const"] == kind


@pytest.mark.parametrize("base", ONE_A_FILE, ids=lambda base: base.__name__)
def test_one_class_a_file(base: type[Component]) -> None:
    files = Counter(cls.__module__ for of, _, cls in COMPONENTS if of is base)
    assert {file for file, count in files.items() if count > 1} == set()


def test_kinds_of_one_base_differ() -> None:
    names = Counter((base, kind) for base, kind, _ in COMPONENTS)
    assert set(names.values()) == {1}


def _signals(logits: torch.Tensor) -> Signals:
    count, width = logits.shape
    return Signals(logits, torch.arange(count) % width, torch.zeros(count, dtype=torch.long))


def _logits(seed: int, size: float = 1.0) -> torch.Tensor:
    return torch.randn(7, 11, generator=torch.Generator().manual_seed(seed)) * size


def _taught(cls: type[Any], teacher: torch.Tensor) -> Signals | None:
    return _signals(teacher) if cls.needs_teacher else None


@every_loss
def test_loss_is_a_number_a_token_and_not_negative(cls: type[Any]) -> None:
    found = _made(cls)(_signals(_logits(1)), _taught(cls, _logits(2)))
    assert found.shape == (7,)
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    assert (found > 1e-3).all()  # student and teacher differ everywhere


@every_loss
def test_loss_of_no_token_is_empty(cls: type[Any]) -> None:
    assert _made(cls)(_signals(_logits(1)[:0]), _taught(cls, _logits(2)[:0])).shape == (0,)


@every_loss
def test_loss_of_a_token_depends_on_that_token_alone(cls: type[Any]) -> None:
    student, teacher = _signals(_logits(1)), _taught(cls, _logits(2))
    keep = torch.tensor([0, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    part = _made(cls)(student.where(keep), teacher and teacher.where(keep))
    torch.testing.assert_close(part, _made(cls)(student, teacher)[keep])


@every_loss
def test_loss_is_zero_where_student_and_teacher_agree(cls: type[Any]) -> None:
    if not cls.needs_teacher:  # agrees with its tokens instead
        certain = torch.full((7, 11), -1e4)
        certain[torch.arange(7), torch.arange(7) % 11] = 1e4
        torch.testing.assert_close(_made(cls)(_signals(certain), None), torch.zeros(7))
        return
    torch.testing.assert_close(
        _made(cls)(_signals(_logits(1, 5.0)), _signals(_logits(1, 5.0))), torch.zeros(7), atol=1e-6, rtol=0
    )


@every_loss
def test_loss_is_finite_at_extremes_in_bfloat16(cls: type[Any]) -> None:
    student = (_logits(1).sign() * 1e4).bfloat16().requires_grad_()
    found = _made(cls)(_signals(student), _taught(cls, (_logits(2).sign() * 1e4).bfloat16()))
    found.sum().backward()
    assert found.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@every_loss
def test_a_word_that_is_ruled_out_is_as_if_there_were_none(cls: type[Any]) -> None:
    """Its logit is -inf on both sides: no NaN in the loss or in the gradient, and nothing else changes."""
    logits, muted = (_logits(1), _logits(2)), torch.arange(11) == 10
    student = logits[0].masked_fill(muted, -torch.inf).requires_grad_()
    found = _made(cls)(_signals(student), _taught(cls, logits[1].masked_fill(muted, -torch.inf)))
    found.sum().backward()
    torch.testing.assert_close(found, _made(cls)(_signals(logits[0][:, :10]), _taught(cls, logits[1][:, :10])))
    assert student.grad is not None
    assert student.grad.isfinite().all()


@every_loss
def test_gradient_goes_to_the_student_alone(cls: type[Any]) -> None:
    student, teacher = _logits(1).requires_grad_(), _logits(2).requires_grad_()
    _made(cls)(_signals(student), _taught(cls, teacher)).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert (student.grad.abs().sum(1) > 0).all()  # each token teaches


CITY = Example("1", "Where?", "Q: Where?\nA:", choices=("bank", "the old town", "U.S.", "math problem"))
NLI = Example("1", "p h", "p h", choices=("entailment", "neutral", "contradiction"))
ANSWERS: dict[str, list[tuple[Example, str]]] = {
    "anli": [(NLI, label) for label in NLI.choices],
    "esnli": [(NLI, label) for label in NLI.choices],
    "cqa": [(CITY, label) for label in CITY.choices],
    "bill": [(Example("1", "how dear ?", "how dear ?", choices=("low", "fair")), label) for label in ("low", "fair")],
    "gsm8k": [(Example("1", "How many?", "How many?"), label) for label in ("72", "1234.5", "-3", "0", "1000000")],
    "jsonl": [(Example("1", "What?", "What?"), "red car"), *((CITY, label) for label in CITY.choices)],
    "shop": [(Example("1", "who ?", "who ?", choices=("ann", "bob")), label) for label in ("ann", "bob")],
    "strategyqa": [(Example("1", "Is it?", "Is it?", choices=("yes", "no")), label) for label in ("yes", "no")],
    "svamp": [
        (Example("1", "How many?", "How many?"), label)
        for label in ("( 84.0 / 2.0 )", "( ( 3.0 + 4.0 ) * 2.5 )", "( 7.0 - ( 3.0 + 1.0 ) )", "( 1.0 - 8.0 )")
    ],
}


@pytest.mark.parametrize("kind", TASKS)
def test_task_says_what_it_is(kind: str) -> None:
    cls = TASKS[kind]
    assert cls.title
    assert not cls.title.endswith(".")
    assert cls.licence not in ("", "unknown")
    assert cls.answer in get_args(AnswerKind)
    assert _made(cls).answer_kind() in get_args(AnswerKind)


@pytest.mark.parametrize("kind", TASKS)
def test_task_reads_back_the_sentence_that_it_writes(kind: str) -> None:
    """A new task needs examples in ANSWERS."""
    task: Any = _made(TASKS[kind])
    for example, label in ANSWERS[kind]:
        sentence = task.answer_sentence(label, example)
        read = parse(f"some rationale. {sentence}", task, example)
        assert (read.label, read.rationale, read.problem) == (label, "some rationale.", ""), sentence
        assert task.same(read.label, label)


@pytest.mark.parametrize("kind", TASKS)
def test_task_tells_labels_apart(kind: str) -> None:
    task: Any = _made(TASKS[kind])
    labels = [label for _, label in ANSWERS[kind]]
    assert len(labels) > 1
    for first in labels:
        assert [second for second in labels if task.same(first, second)] == [first] * labels.count(first)


@pytest.mark.parametrize("kind", TASKS)
def test_task_reads_no_label_where_none_is_stated(kind: str) -> None:
    example, _ = ANSWERS[kind][0]
    read = parse("some rationale, and nothing else", _made(TASKS[kind]), example)
    assert (read.label, read.problem) == (None, "no answer sentence")


def _chain(rationale: str, **changes: Any) -> Chain:
    facts = {"label": "a", "voted_label": "a", "agreement": 1.0, "gold_label": "a"}
    return Chain(rationale=rationale, same=str.__eq__, **(facts | changes))


BAD = {"label": None, "voted_label": None, "agreement": 0.01, "gold_label": None}


@pytest.mark.parametrize("kind", KEEPS)
def test_rule_keeps_the_best_and_drops_the_worst(kind: str) -> None:
    """The worst are unread, alone in their label, long, and the same text three times."""
    rule: Any = _made(KEEPS[kind])
    best, worst = _chain("r"), [_chain("far too long for it", **BAD) for _ in range(3)]
    assert list(rule.select([best])) == [best]
    assert len(rule.select(worst)) < len(worst)


@pytest.mark.parametrize("kind", KEEPS)
def test_rule_gives_some_of_its_chains_in_their_order(kind: str) -> None:
    rule: Any = _made(KEEPS[kind])
    rule.check()
    assert list(rule.select([])) == []
    chains = [_chain(text, **of) for of in ({}, BAD) for text in ("a b c d", "a", "e f", "a", "A b")]
    places = [next(i for i, chain in enumerate(chains) if chain is one) for one in rule.select(chains)]
    assert places == sorted(set(places))
    assert places == [next(i for i, chain in enumerate(chains) if chain is one) for one in rule.select(chains)], (
        "the same chains give the same"
    )


def test_targets_are_those_that_rows_are_numbered_by() -> None:
    assert TARGETS == ("label", "rationale", "rationale_then_label")
