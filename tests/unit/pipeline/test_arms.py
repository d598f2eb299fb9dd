"""What a recipe trains: the student, its ablations and its controls, and the steps that the same compute pays for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from distill_llm.core.errors import ConfigError
from distill_llm.data.rows import Row, RowView
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.pipeline.arms import Arm, Sizes, choose, needed_targets, plan_arms
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe

YAML = """
name: tiny
task: {kind: shop}
rationales: {teacher: {kind: gold}}
student:
  config: {model_type: t5}
  tokenizer: {kind: words}
teachers: {big: {kind: frozen, model: a/b}, huge: {kind: frozen, model: a/c}}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}
  - {name: soft_label, loss: {kind: forward_kl}, targets: [label], teacher: big, weight: 0.5}
train: {max_steps: 100, rows_per_step: 4, rows_per_batch: 4}
"""
ONLY_TEXT = "objective=[{name: label, loss: {kind: cross_entropy}, targets: [label]}, {name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}]"  # noqa: E501

# Tokens of a row (input and target): labels 10 + 2 and 8 + 2, rationales 10 + 30, 8 + 22 and 8 + 12.
ROWS = [
    Row(0, "label", [5] * 10, [1] * 2),
    Row(0, "rationale", [5] * 10, [1] * 30),
    Row(1, "label", [5] * 8, [1] * 2),
    Row(1, "rationale", [5] * 8, [1] * 22),
    Row(1, "rationale", [5] * 8, [1] * 12),
]
LABELS, RATIONALES = (12 + 10), (40 + 30 + 20)


def _recipe(*overrides: str) -> Recipe:
    return recipe_from(parse_yaml(YAML, "tiny"), overrides)


def _arms(recipe: Recipe, student: int = 1000, **teachers: int) -> dict[str, Arm]:
    sizes = teachers or {"big": 9000, "huge": 70_000}
    return {arm.name: arm for arm in plan_arms(recipe, ROWS, Sizes({"student": student}, sizes))}


def test_same_compute_without_a_teacher_counts_tokens() -> None:
    """A mean row of the student has 112 / 5 tokens, one of the control 22 / 2; parameters cancel."""
    arms = _arms(_recipe(ONLY_TEXT))
    assert arms["labels_same_compute"].max_steps == round(100 * (112 / 5) / (22 / 2)) == 204
    assert arms["labels_same_compute"].description == "labels only, same compute: 2.04 x the steps"
    assert _arms(_recipe(ONLY_TEXT), student=7)["labels_same_compute"].max_steps == 204


def test_same_compute_with_a_teacher_adds_its_forward_passes() -> None:
    """6 * 1000 for each token of the student, 2 * 9000 more on label rows, where the teacher is run."""
    student = (LABELS * (6 * 1000 + 2 * 9000) + RATIONALES * 6 * 1000) / 5
    control = LABELS * 6 * 1000 / 2
    assert _arms(_recipe())["labels_same_compute"].max_steps == round(100 * student / control) == 324


def test_a_teacher_of_two_terms_is_run_once_a_row() -> None:
    twice = "objective.1={name: soft_too, loss: {kind: forward_kl, temperature: 2}, targets: [label], teacher: big}"
    once = "objective.1={name: rest, loss: {kind: cross_entropy}, targets: [label]}"
    assert _arms(_recipe(twice))["labels_same_compute"].max_steps == 400  # (6 + 18) / 6
    assert _arms(_recipe(once))["labels_same_compute"].max_steps == 400


def test_two_teachers_are_paid_for_both() -> None:
    both = "objective.1={name: soft_too, loss: {kind: forward_kl}, targets: [label], teacher: huge}"
    assert _arms(_recipe(both), big=3000, huge=6000)["labels_same_compute"].max_steps == 400  # (6 + 6 + 12) / 6


def test_a_teacher_with_a_view_of_its_own_is_paid_for_what_it_reads() -> None:
    """Label rows of 12 and 10 tokens, of which it reads 112 and 110; as a member of an ensemble likewise."""
    rows = [
        replace(row, views={"big": RowView([5] * 100, [*row.input_ids, *row.label_ids], [])})
        if row.target == "label"
        else row
        for row in ROWS
    ]
    both = "teachers.both={kind: ensemble, of: [big, huge]}"
    asked = "objective.soft_label={name: soft, loss: {kind: forward_kl}, targets: [label], teacher: both}"
    for recipe, forward in ((_recipe(), 222 * 2 * 90), (_recipe(both, asked), 222 * 2 * 90 + 22 * 2 * 500)):
        sizes = {"big": 90, "huge": 500, "both": 0}
        arms = {arm.name: arm for arm in plan_arms(recipe, rows, Sizes({"student": 1000}, sizes))}
        student = ((LABELS + RATIONALES) * 6 * 1000 + forward) / 5
        control = LABELS * 6 * 1000 / 2
        assert arms["labels_same_compute"].max_steps == round(100 * student / control)


def test_controls_learn_labels_alone_with_plain_cross_entropy() -> None:
    arms = _arms(_recipe("evaluate.target=rationale_then_label", "objective.label.weight=3"))
    assert list(arms) == ["student", "labels_same_steps", "labels_same_compute"]
    assert arms["labels_same_steps"].max_steps == 100
    for name in ("labels_same_steps", "labels_same_compute"):
        (term,) = arms[name].terms
        assert (arms[name].role, arms[name].evaluate_target) == ("control", "label")
        assert (term.loss, term.targets, term.weight, term.teacher) == (CrossEntropy(), ("label",), 1.0, None)
        assert arms[name].rows_of(ROWS) == [ROWS[0], ROWS[2]]


def test_controls_that_the_recipe_names() -> None:
    assert list(_arms(_recipe("evaluate.controls=[labels_same_compute]"))) == ["student", "labels_same_compute"]
    assert list(_arms(_recipe("evaluate.controls=[]"))) == ["student"]


def test_ablation_keeps_its_terms_as_they_are_and_the_student_s_steps() -> None:
    recipe = _recipe("evaluate.ablations={soft: [soft_label, label]}")
    arms = _arms(recipe)
    assert list(arms) == ["student", "soft", "labels_same_steps", "labels_same_compute"]
    assert arms["soft"].terms == (recipe.objective[0], recipe.objective[2])
    assert (arms["soft"].max_steps, arms["soft"].role) == (100, "student")
    assert arms["soft"].description == "label + soft label"
    assert arms["soft"].rows_of(ROWS) == [ROWS[0], ROWS[2]]


@pytest.mark.parametrize(("kept", "asked"), [("[rationale]", "rationale"), ("[label, rationale]", "label")])
def test_ablation_is_asked_for_what_it_learned(kept: str, asked: str) -> None:
    assert _arms(_recipe(f"evaluate.ablations={{part: {kept}}}"))["part"].evaluate_target == asked


@pytest.mark.parametrize(
    ("epochs", "overrides", "steps"),
    [
        (2, [], 3),  # 2 x 5 rows / 4, rounded up
        (4, [], 5),
        (4, ["rationales=null", "objective=[{name: a, loss: {kind: cross_entropy}, targets: [label]}]"], 2),
    ],
)
def test_epochs_are_passes_over_the_rows_that_the_student_sees(epochs: int, overrides: list[str], steps: int) -> None:
    recipe = _recipe("train.max_steps=0", f"train.epochs={epochs}", *overrides)
    assert _arms(recipe)["student"].max_steps == steps


def test_needed_targets_are_those_of_student_and_controls() -> None:
    rationale = "objective=[{name: r, loss: {kind: cross_entropy}, targets: [rationale]}]"
    assert needed_targets(_recipe(rationale)) == ("label", "rationale")
    assert needed_targets(_recipe(rationale, "evaluate.controls=[]")) == ("rationale",)


def test_choose() -> None:
    arms: Any = list(_arms(_recipe()).values())
    assert choose(arms, ["labels_same_steps", "student"]) == [arms[1], arms[0]]
    assert choose(arms, ["student", "all"]) == arms
    with pytest.raises(ConfigError, match=r"--arm studnt: .*\['labels_same_compute', .*'student'\]"):
        choose(arms, ["studnt"])
