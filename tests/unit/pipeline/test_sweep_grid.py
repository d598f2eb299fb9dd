"""Which words vary a key, which runs come of them, and what is refused before anything is written."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from distill_llm.core.errors import ConfigError
from distill_llm.pipeline.sweep_grid import SweepPlan, plan_sweep
from distill_llm.pipeline.sweep_words import short_keys, short_values, written
from distill_llm.recipe.load import parse_yaml

YAML = """
name: tiny
seed: 5
task: {kind: shop, products: 20, train_size: 12, validation_size: 4, test_size: 4}
rationales: {teacher: {kind: gold}}
student:
  config: {model_type: t5, d_model: 16}
  tokenizer: {kind: words}
teachers: {big: {kind: frozen, model: runs/big/model}}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: soft, loss: {kind: forward_kl}, targets: [label], teacher: big}
train: {max_steps: 3}
"""
TEMPERATURE = "objective.soft.loss.temperature"


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plans a sweep over the recipe, in an empty folder that must stay empty; the mapping must stay as it is."""
    monkeypatch.chdir(tmp_path)
    data = parse_yaml(YAML, "tiny")

    def make(*words: str, **options: Any) -> SweepPlan:
        before = copy.deepcopy(data)
        try:
            return plan_sweep(data, words, source="tiny.yaml", **options)
        finally:
            assert data == before
            assert not list(tmp_path.iterdir())

    return make


def _values(plan: SweepPlan) -> list[tuple[Any, ...]]:
    return [
        tuple(axis.values[place] for axis, place in zip(plan.axes, setting.places, strict=True))
        for setting in plan.settings
    ]


def test_grid_is_every_combination(plan: Any) -> None:
    made = plan(f"{TEMPERATURE}=[1, 2.5]", "train.max_steps=7", "student.config.d_model=[16, 32]")
    assert _values(made) == [(1, 16), (1, 32), (2.5, 16), (2.5, 32)]
    recipes = [setting.recipes[0] for setting in made.settings]
    assert [recipe.objective[1].loss.temperature for recipe in recipes] == [1, 1, 2.5, 2.5]
    assert [recipe.student.config["d_model"] for recipe in recipes] == [16, 32, 16, 32]
    assert {recipe.train.max_steps for recipe in recipes} == {7}
    assert {recipe.train.seed for recipe in recipes} == {"recipe"}
    assert len({recipe.run_dir for recipe in recipes}) == 4
    assert {str(recipe.folder.parent) for recipe in recipes} == {"runs/tiny/sweep/runs"}
    assert made.settings[3].overrides == (f"{TEMPERATURE}=2.5", "student.config.d_model=32")
    assert str(made.folder) == "runs/tiny/sweep/by-temperature+d_model"


def test_keys_joined_by_a_comma_move_together(plan: Any) -> None:
    made = plan("teachers.big.model,student.tokenizer=[a, b]")
    recipes = [setting.recipes[0] for setting in made.settings]
    assert [(recipe.teachers["big"].model, recipe.student.tokenizer) for recipe in recipes] == [("a", "a"), ("b", "b")]


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("train.tune=[0.1, 0.2]", None),  # takes a list, though the file leaves it out
        ("objective.soft.targets=[label]", None),  # takes a list, and the file has one
        ("evaluate.controls=[]", None),
        ("train.tune=[[0.1], [0.2]]", [[0.1], [0.2]]),
        ("evaluate.max_new_tokens=[[3]]", "is not a valid recipe"),
        ("student.lora=[null]", [None]),
    ],
)
def test_list_varies_a_key_but_where_the_key_takes_a_list(word: str, values: Any, plan: Any) -> None:
    if isinstance(values, str):
        with pytest.raises(ConfigError, match=values):
            plan(word)
        return
    made = plan(word, f"{TEMPERATURE}=[1, 2]")
    varied = [axis for axis in made.axes if axis.keys != (TEMPERATURE,)]
    assert [list(axis.values) for axis in varied] == ([] if values is None else [values])


def test_whole_objective_may_go_along(plan: Any) -> None:
    """Though the recipe is not valid before what varies is in it."""
    terms = "objective=[{name: only, loss: {kind: forward_kl}, targets: [label], teacher: other}]"
    made = plan("teachers={}", terms, "teachers.other=[{kind: frozen, model: m}, {kind: ema}]")
    assert [setting.recipes[0].teachers["other"].kind for setting in made.settings] == ["frozen", "ema"]
    assert made.axes[0].shown == ("kind: frozen, model: m", "kind: ema")


def test_seeds_train_anew_on_the_same_data(plan: Any) -> None:
    made = plan(f"{TEMPERATURE}=[1, 2]", seeds=3)
    assert made.seeds == (5, 6, 7)
    assert [(seed, recipe.seed, recipe.training_seed) for _, seed, recipe in made.runs] == [
        *[(5, 5, 5)] * 2,
        *[(6, 5, 6)] * 2,
        *[(7, 5, 7)] * 2,
    ]
    assert len({recipe.run_dir for _, _, recipe in made.runs}) == 6
    assert plan("train.seed=11", f"{TEMPERATURE}=[1]", seeds=2).seeds == (11, 12)


def test_larger_sample_holds_the_smaller(plan: Any) -> None:
    words = [f"{TEMPERATURE}=[1, 2, 3, 4, 5]", "train.max_steps=[1, 2, 3, 4]"]
    whole = _values(plan(*words))
    samples = [_values(plan(*words, sample=size)) for size in (3, 7, 20, 99)]
    assert [len(sample) for sample in samples] == [3, 7, 20, 20]
    assert samples[2] == whole
    for smaller, larger in itertools.pairwise(samples):
        assert set(smaller) <= set(larger)
        assert larger == [values for values in whole if values in larger]  # in the order of the grid
    order = list(range(20))
    random.Random("5 sweep").shuffle(order)
    assert samples[0] == [whole[number] for number in sorted(order[:3])]
    assert _values(plan(*words, "seed=6", sample=7)) != samples[1]


def test_run_is_found_again_whatever_it_is_compared_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = parse_yaml(YAML, "tiny")
    first = plan_sweep(data, ["teachers.big.model=[runs/a/model, runs/b/model]"]).settings[1].recipes[0]
    first.folder.mkdir(parents=True)
    words = ["teachers.big.model=[b, runs/b/model]", "evaluate.controls=[]", "train.workers=2", f"{TEMPERATURE}=[1,2]"]
    again = [setting.recipes[0].run_dir for setting in plan_sweep(data, words).settings]
    assert again.count(first.run_dir) == 1
    assert again[2] == first.run_dir
    other = plan_sweep(data, ["teachers.big.model=[runs/b/model]", "evaluate.max_new_tokens=3"]).settings[0].recipes[0]
    assert other.run_dir != first.run_dir  # it would be validated otherwise


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing varies. Give a key a list of values to try, such as"),
        (["train.max_steps=7"], "nothing varies"),
        (["train.tune=[0.1, 0.2]"], "nothing varies"),
        ([f"{TEMPERATURE}=[]"], f"sweep: {TEMPERATURE}=[] has no value to try"),
        (["temperature"], "'temperature': expected key=value, the same for all runs, or key=[value, value]"),
        (["=[1]"], "'=[1]': expected key=value"),
        ([f"{TEMPERATURE}=[1", "x=[2]"], "is not readable YAML"),
        (["objective.sft.loss.temperature=[1]"], "'sft' is not in the list; expected one of ['label', 'soft']"),
        (
            ["train.max_step=[1, 2]"],
            "tiny.yaml with train.max_step=1 is not a valid recipe:\n  train.max_step: there is",
        ),
        ([f"{TEMPERATURE}=[1, -1]"], f"tiny.yaml with {TEMPERATURE}=-1 is not a valid recipe"),
        ([f"{TEMPERATURE}=[1]", f"{TEMPERATURE}=[2]"], f"{TEMPERATURE} is given several lists"),
        ([f"{TEMPERATURE}=[1, 2, 1]"], f"{TEMPERATURE}=1 and {TEMPERATURE}=1 train the same student"),
        (["train.workers=[1, 2]"], "train.workers=1 and train.workers=2 train the same student"),
        (["seed=[1, 2]"], "seed cannot vary: it draws the data's splits too"),
        (["train.seed=[1, 2]"], "train.seed cannot vary"),
        (["run_dir=[a, b]"], "run_dir cannot vary"),
        (["name=[a, b]"], "name cannot vary"),
    ],
)
def test_what_cannot_be_swept_is_one_error_and_nothing_is_written(words: list[str], said: str, plan: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(*words)
    assert said in str(caught.value)


@pytest.mark.parametrize("options", [{"seeds": 0}, {"sample": -1}])
def test_counts_are_checked(options: Any, plan: Any) -> None:
    with pytest.raises(ConfigError, match="expected 1 or more seeds"):
        plan(f"{TEMPERATURE}=[1]", **options)


@pytest.mark.parametrize(
    "value", ["a/b", "yes", "1", "", " a", "a: b", "[x", "é", 1, 1e-5, 2.0, True, None, [1, "b"], {"a": {"b": "1"}}]
)
def test_written_value_is_read_back(value: Any) -> None:
    assert parse_yaml(written(value), "value") == value


def test_short_words_tell_apart() -> None:
    assert short_keys(["teachers.big.model", "student.model", "train.max_steps"]) == [
        "big.model",
        "student.model",
        "max_steps",
    ]
    assert short_values(["runs/a/models/student/model", "runs/b/models/student/model"]) == ["a", "b"]
    assert short_values(["runs/a/x/model", "runs/a/model"]) == ["x/model", "model"]
    assert short_values([{"kind": "frozen", "model": "a"}, {"kind": "frozen", "model": "b"}]) == [
        "model: a",
        "model: b",
    ]
    assert short_values([1, 2.5, True, None]) == ["1", "2.5", "true", "null"]
    long = short_values(["w" * 40 + "1", "w" * 40 + "2"])
    assert len(set(long)) == 2
    assert all(len(text) < 40 for text in long)
