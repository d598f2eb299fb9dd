"""Schedules: their values, and what a recipe says about wrong ones."""

from __future__ import annotations

from typing import Any

import pytest

from distill_llm.core.errors import ConfigError
from distill_llm.core.schedule import Schedule, number_at
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe

YAML = """
name: tiny
task: {kind: shop, products: 20}
student:
  config: {model_type: t5, d_model: 16}
  tokenizer: {kind: words}
teachers: {big: {kind: frozen, model: a/b}}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: soft, loss: {kind: forward_kl}, targets: [label], teacher: big}
train: {max_steps: 3}
"""


def _load(*overrides: str) -> Recipe:
    return recipe_from(parse_yaml(YAML, "tiny.yaml"), overrides, source="tiny.yaml")


@pytest.mark.parametrize(
    ("progress", "linear", "cosine"),
    [  # a cosine's share is (1 - cos(pi * progress / over)) / 2
        (0.0, 3.0, 3.0),
        (0.125, 2.5, 3 - 2 * 0.146446609),
        (0.25, 2.0, 2.0),
        (0.375, 1.5, 3 - 2 * 0.853553391),
        (0.5, 1.0, 1.0),
        (0.75, 1.0, 1.0),
        (1.0, 1.0, 1.0),
    ],
)
def test_value_moves_from_start_to_end_and_stays(progress: float, linear: float, cosine: float) -> None:
    assert Schedule(start=3, end=1, over=0.5).value(progress) == pytest.approx(linear)
    assert Schedule(start=3, end=1, over=0.5, shape="cosine").value(progress) == pytest.approx(cosine)


def test_it_takes_the_whole_training_by_default() -> None:
    rising = Schedule(start=0.0, end=2.0)
    assert [rising.value(step / 4) for step in range(5)] == [0.0, 0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_it_never_turns_back_or_leaves_its_bounds(shape: Any) -> None:
    values = [Schedule(start=0.1, end=0.7, over=0.9, shape=shape).value(step / 1000) for step in range(1001)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(0.1)
    assert max(values) == pytest.approx(0.7)


def test_a_number_is_its_own_schedule() -> None:
    assert number_at(0.25, 0.9) == 0.25
    assert number_at(Schedule(start=1, end=0), 0.9) == pytest.approx(0.1)


def test_a_recipe_takes_a_number_or_a_schedule() -> None:
    term = _load(
        "objective.soft.weight={start: 1, end: 0, over: 0.5, shape: cosine}",
        "objective.soft.loss.temperature={start: 4, end: 1}",
    ).objective[1]
    assert term.weight == Schedule(start=1, end=0, over=0.5, shape="cosine")
    now = term.at(0.25)
    assert now.weight == pytest.approx(0.5)
    assert now.loss.model_dump()["temperature"] == pytest.approx(3.25)
    assert _load("objective.soft.weight=2").objective[1].weight == 2.0


def test_a_schedule_survives_being_written_and_read() -> None:
    recipe = _load("objective.soft.weight={start: 1, end: 0}", "objective.soft.loss.temperature={start: 4, end: 1}")
    assert recipe_from(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("soft.weight=0", "soft.weight: Input should be greater than 0; it is 0."),
        ("soft.weight=much", "soft.weight: Input should be a valid number, unable to parse string as a number; "),
        ("soft.weight=[1, 2]", "soft.weight: Input should be a valid number; it is [1, 2]."),
        ("soft.weight={start: 1}", "soft.weight.end: this key is required and missing."),
        ("soft.weight={start: 1, end: -1}", "soft.weight.end: Input should be greater than or equal to 0; it is -1."),
        ("soft.weight={start: 1, end: 2, over: 0}", "soft.weight.over: Input should be greater than 0; it is 0."),
        ("soft.weight={start: 1, end: 2, over: 3}", "soft.weight.over: Input should be less than or equal to 1; it is"),
        ("soft.weight={start: 1, end: 2, shape: step}", "soft.weight.shape: Input should be 'linear' or 'cosine'; it "),
        ("soft.weight={start: 1, end: 2, ovr: 1}", "soft.weight.ovr: there is no such key (its value is 1). Did you"),
        ("soft.loss.temperature=0", "soft.loss.temperature: Input should be greater than 0; it is 0."),
        ("soft.loss.temperature=.inf", "soft.loss.temperature: Input should be a finite number; it is inf."),
        (
            "soft.loss.temperature={start: 2, end: 0}",
            "soft.loss.temperature: a temperature must stay above 0, and this schedule goes from 2 to 0.",
        ),
        ("soft.loss.temperature={start: -1, end: 1}", "soft.loss.temperature.start: Input should be greater than or "),
        ("soft.until=0", "soft.until: Input should be greater than 0; it is 0."),
        ("soft.until=1.5", "soft.until: Input should be less than or equal to 1; it is 1.5."),
        ("soft.row_weight=votes", "soft.row_weight: Input should be 'equal' or 'agreement'; it is 'votes'."),
    ],
)
def test_a_wrong_one_is_refused_in_one_line_that_names_its_path(override: str, said: str) -> None:
    """Where a number or a schedule may stand, only the one that was written is spoken of."""
    with pytest.raises(ConfigError) as caught:
        _load(f"objective.{override}")
    head, line = str(caught.value).split("\n")
    assert head == "tiny.yaml is not a valid recipe:"
    assert line.startswith(f"  objective.{said}")


def test_other_faults_are_still_told_beside_it() -> None:
    """A number that is missing and a section where a text belongs are no other branch of anything."""
    with pytest.raises(ConfigError) as caught:
        _load("objective.soft.weight=0", "train.learning_rate=null", "name={a: 1}")
    lines = str(caught.value).split("\n")[1:]
    assert sorted(line.split(":")[0].strip() for line in lines) == [
        "name",
        "objective.soft.weight",
        "train.learning_rate",
    ]


def test_an_objective_whose_every_term_ends_early_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"\n  objective: every term ends \(`until`\) before the training does; let one"
    ):
        _load("objective.label.until=0.5", "objective.soft.until=0.9")
    assert _load("objective.soft.until=0.9").objective[1].until == 0.9
