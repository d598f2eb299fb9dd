"""The stages of pruning: steps down to the student's sizes, shares of the recipe's steps, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from transformers import LlamaConfig, T5Config

from distill_llm.core.errors import ConfigError
from distill_llm.models.anatomy import family_of
from distill_llm.models.cut_sizes import cut_config, first_layers, sizes_after
from distill_llm.models.cut_spec import Cut
from distill_llm.models.cut_steps import check_steps, steps_to
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe
from distill_llm.schemes.stages import outline

YAML = """
name: tiny
task: {kind: shop}
rationales: {teacher: {kind: gold}}
student: {model: a/b, cut: {ratio: 0.5}}
teachers: {uncut: {kind: frozen, model: a/b}}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: soft, loss: {kind: forward_kl}, targets: [label], teacher: uncut}
train: {max_steps: 100, rows_per_step: 4, rows_per_batch: 4}
scheme: {kind: prune, cuts: 3, recovery_share: 0.4}
"""
T5 = T5Config(vocab_size=100, d_model=64, d_kv=8, d_ff=128, num_layers=6, num_decoder_layers=4, num_heads=8)
GROUPED = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
)


def _recipe(*overrides: str) -> Recipe:
    return recipe_from(parse_yaml(YAML, "tiny"), overrides)


def test_each_stage_starts_from_the_one_before_and_has_its_share_of_the_steps() -> None:
    stages = _recipe().stages
    assert [stage.name for stage in stages] == ["cut_1", "cut_2", "student"]
    assert [stage.after for stage in stages] == [(), ("cut_1",), ("cut_2",)]
    assert [stage.share_of_steps for stage in stages] == pytest.approx([0.2, 0.2, 0.6])
    models = [stage.student.model for stage in stages]
    assert models == ["a/b", "runs/tiny/models/cut_1/model", "runs/tiny/models/cut_2/model"]
    assert [stage.student.tokenizer for stage in stages] == ["", "a/b", "a/b"]
    assert all(stage.terms == _recipe().objective and set(stage.teachers) == {"uncut"} for stage in stages)


def test_the_outline_says_what_the_stages_are() -> None:
    assert outline(_recipe().stages) == [
        "stage 1 of 3, cut_1: label + soft; cut 1 of 3; 20% of the steps",
        "stage 2 of 3, cut_2: label + soft; cut 2 of 3; 20% of the steps",
        "stage 3 of 3, student: label + soft; cut 3 of 3; 60% of the steps",
    ]


def test_one_cut_is_a_plain_training_of_the_cut_student() -> None:
    (stage,) = _recipe("scheme.cuts=1").stages
    (plain,) = _recipe("scheme={kind: step_by_step}").stages
    assert (stage.student, stage.terms, stage.share_of_steps) == (plain.student, plain.terms, 1.0)


@pytest.mark.parametrize(
    ("config", "cut"),
    [
        (T5, {"ratio": 0.4}),
        (T5, {"layers": {"encoder": 3, "decoder": 1}, "neurons": 32}),
        (GROUPED, {"ratio": 0.4}),
        (GROUPED, {"ratio": 0.4, "along": ["layers"]}),
        (GROUPED, {"heads": 4, "neurons": 20, "hidden": 32}),
        (LlamaConfig(num_attention_heads=12, num_key_value_heads=2, hidden_size=120, vocab_size=10), {"heads": 4}),
    ],
)
@pytest.mark.parametrize("spacing", ["geometric", "linear"])
def test_steps_go_down_to_the_sizes_of_one_cut(config: Any, cut: Any, spacing: Any) -> None:
    """And each can be made of what the one before left: with equal ratios, or equal numbers, between them."""
    whole = family_of(config, "x").sizes_of(config)
    for number in (1, 2, 4):
        steps = steps_to(config, Cut.model_validate(cut), number, spacing, "x")
        check_steps(config, Cut.model_validate(cut), steps, "x")
        begun, sizes = config, [whole]
        for step in steps:
            sizes.append(sizes_after(begun, step, "x"))
            begun = cut_config(begun, sizes[-1], first_layers(sizes[-1]), "x")
        assert sizes[-1] == sizes_after(config, Cut.model_validate(cut), "x")
        for above, below in pairwise(sizes):
            assert all(above.of(unit) >= below.of(unit) for unit in ("heads", "groups", "neurons", "hidden"))
            assert all(above.layers[stack] >= below.layers[stack] for stack in whole.layers)


@pytest.mark.parametrize(("spacing", "neurons"), [("geometric", [64, 32]), ("linear", [80, 32])])
def test_equal_ratios_or_equal_numbers(spacing: Any, neurons: list[int]) -> None:
    assert [step.neurons for step in steps_to(T5, Cut(neurons=32), 2, spacing, "x")] == neurons


def test_steps_that_do_not_come_to_the_students_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"scheme\.steps: the last step leaves .* but student\.cut asks for"):
        check_steps(T5, Cut(neurons=32), [Cut(neurons=64), Cut(neurons=40)], "scheme.steps")
    with pytest.raises(ConfigError, match=r"scheme\.steps 2\.neurons: 80 are more than the 64"):
        check_steps(T5, Cut(neurons=32), [Cut(neurons=64), Cut(neurons=80)], "scheme.steps")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["student={model: a/b}"], "prune needs a `student.model` with a `student.cut`"),
        (["student.cut={layers: [0, 2]}"], "names layers one by one"),
        (["scheme.steps=[{neurons: 8}]"], "`steps` names 1 cuts, and `cuts` is 3"),
        (["student.lora={rank: 4}"], "`cut` with `lora`"),
        (["student={config: {model_type: t5}, tokenizer: {kind: words}, cut: {neurons: 8}}"], "is for a `model`"),
        (["scheme={kind: mutual}", "objective.soft.teacher=peers"], "remove `student.cut`"),
        (
            ["scheme={kind: step_by_step}", "evaluate.from_scratch=true", "student={model: a/b, fresh: true}"],
            "starts from fresh weights",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _recipe(*overrides)


def test_a_later_weight_is_not_cut_again() -> None:
    """Assistants, and what comes after hints, have weights of their own."""
    chain = "scheme={kind: assistant_chain, teacher: uncut, assistants: [{name: middle, model: c/d}]}"
    middle, student = _recipe(chain).stages
    assert (middle.student.cut, student.student.cut) == (None, Cut(ratio=0.5))
    hint = "objective.soft={name: soft, loss: {kind: hint}, targets: [label], teacher: uncut}"
    first, second = _recipe("scheme={kind: hint_first}", hint).stages
    assert (first.student.cut, second.student.cut) == (Cut(ratio=0.5), None)
