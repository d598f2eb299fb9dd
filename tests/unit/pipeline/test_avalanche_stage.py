"""The error avalanche of a run whose teachers cannot be asked: of its stages alone, with the reason said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill_llm.pipeline.avalanche_stage import avalanche_of
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.recipe.load import parse_yaml, recipe_from

YAML = """
name: tiny
task: {kind: shop}
student: {config: {model_type: t5}, tokenizer: {kind: words}}
teachers: {big: {kind: frozen, model: ./nowhere}}
scheme: {kind: assistant_chain, teacher: big, assistants: [{name: next_one, config: {d_model: 64}}]}
objective:
  - {name: soft, loss: {kind: universal_logit}, targets: [label], teacher: big}
train: {max_steps: 1}
"""
ANSWERS = {"next_one": [True, False, True], "student": [True, False, False], "direct": [True, True, True]}


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("teachers.big.revision=main", "there is no folder './nowhere'"),
        ("teachers.big.own_tokenizer=true", "it does not read what the student reads"),
    ],
)
def test_a_teacher_that_cannot_be_asked_is_left_out(tmp_path: Path, sayings: Any, override: str, why: str) -> None:
    recipe = recipe_from(parse_yaml(YAML, "tiny"), [f"run_dir={tmp_path}", override])
    avalanche = avalanche_of(recipe, [], RunFolder(tmp_path), ANSWERS, sayings)
    assert avalanche is not None
    assert [(link.name, link.wrong, link.inherited) for link in avalanche.links] == [
        ("next one", 1, 1),
        ("student", 2, 2),
    ]
    assert avalanche.student.lost == 1
    (said,) = sayings.said
    assert said.startswith("error avalanche: teacher big is left out: ")
    assert why in said


@pytest.mark.parametrize("missing", ["next_one", "student"])
def test_stages_that_are_not_scored_have_none(tmp_path: Path, sayings: Any, missing: str) -> None:
    recipe = recipe_from(parse_yaml(YAML, "tiny"), [f"run_dir={tmp_path}"])
    answers = {name: right for name, right in ANSWERS.items() if name != missing}
    assert avalanche_of(recipe, [], RunFolder(tmp_path), answers, sayings) is None


def test_a_single_stage_has_none(tmp_path: Path, sayings: Any) -> None:
    recipe = recipe_from(parse_yaml(YAML, "tiny"), [f"run_dir={tmp_path}", "scheme.assistants=[]"])
    assert avalanche_of(recipe, [], RunFolder(tmp_path), ANSWERS, sayings) is None
