"""What a recipe may say of `quantization_aware`: its stages, who teaches whom, what they need, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from distill_llm.core.errors import ConfigError
from distill_llm.data.rows import Row
from distill_llm.pipeline.arms import Arm, Sizes, choose, plan_arms
from distill_llm.pipeline.needs import needs_of_stages
from distill_llm.pipeline.plan_facts import plan_facts
from distill_llm.pipeline.rationale_stage import check
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.schemes.stages import on_the_way, outline
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.frozen import Frozen

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill_llm.models.load import LoadedModel
    from distill_llm.recipe.recipe import Recipe

YAML = """
name: tiny
task: {kind: shop, products: 20, train_size: 32, validation_size: 8, test_size: 8}
rationales: {teacher: {kind: gold}}
student:
  config: {model_type: t5, d_model: 16, d_kv: 4, d_ff: 32, num_layers: 1, num_heads: 4}
  tokenizer: {kind: words, vocab_size: 256}
scheme: {kind: quantization_aware, share_of_steps: 0.6, quantize: {group_size: 8}}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: own, loss: {kind: forward_kl}, targets: [label], teacher: full_precision, weight: 0.5}
train: {max_steps: 10, rows_per_step: 8, rows_per_batch: 8}
"""
ROWS = [Row(number, "label", [1, 2, 3], [4, 1]) for number in range(4)]
PRETRAINED = ("student.config={}", "student.model=a/b", "student.tokenizer=''", "scheme.share_of_steps=0")
LONGER = "scheme.longer=true"


def _recipe(*overrides: str) -> Recipe:
    return recipe_from(parse_yaml(YAML, "tiny"), overrides)


def _arms(*overrides: str) -> dict[str, Arm]:
    recipe = _recipe(*overrides)
    sizes = Sizes({stage.name: 1000 for stage in recipe.stages}, {})
    return {arm.name: arm for arm in plan_arms(recipe, ROWS, sizes)}


def test_the_student_begins_from_full_precision_and_learns_from_it() -> None:
    full, afterwards, student = _recipe().stages
    assert (full.name, full.share_of_steps, full.after) == ("full_precision", 0.6, ())
    assert [term.name for term in full.terms] == ["label"], "it has no older self"
    assert isinstance(full.scheme, StepByStep)
    assert (afterwards.name, afterwards.share_of_steps, afterwards.after) == (
        "quantized_afterwards",
        0.0,
        ("full_precision",),
    )
    folder = "runs/tiny/models/full_precision/model"
    assert afterwards.student.model == student.student.model == folder
    assert (student.share_of_steps, student.after) == (0.4, ("full_precision",))
    assert student.teachers == {"full_precision": Frozen(model=folder)}
    assert [term.name for term in student.terms] == ["label", "own"]
    assert not student.student.config
    lines = outline(_recipe().stages)
    assert lines[1].endswith("quantized: weights int4 (a scale for 8 weights), activations int8; not trained")


def test_arms_have_their_share_of_the_steps_and_controls_pay_for_what_the_student_needs() -> None:
    arms = _arms(LONGER)
    assert {name: arm.max_steps for name, arm in arms.items()} == {
        "student": 4,
        "longer_quantized_afterwards": 0,
        "full_precision_longer": 4,
        "quantized_afterwards": 0,
        "full_precision": 6,
        "labels_same_steps": 10,
        "labels_same_compute": 11,  # 6 steps at 6, 4 at 6 + 2: 68 of 60
    }
    assert arms["labels_same_compute"] == _arms()["labels_same_compute"], "what it is compared with costs it nothing"
    assert [stage.name for stage in on_the_way(_recipe(LONGER).stages)] == ["full_precision", "student"]
    assert {arm.name for arm in choose(list(arms.values()), ["longer_quantized_afterwards"])} == {
        "longer_quantized_afterwards",
        "full_precision_longer",
        "full_precision",
    }
    assert arms["full_precision_longer"].terms == arms["student"].terms, "they differ in the rounding alone"


def test_what_changes_in_the_rounding_leaves_full_precision_as_it_is() -> None:
    def facts(name: str, *overrides: str) -> Any:
        recipe, arms = _recipe(*overrides), _arms(*overrides)
        return plan_facts(arms[name], recipe, list(arms.values()), RunFolder(recipe.folder))

    for override in ("scheme.quantize.weights=int8", "scheme.after=0.5"):
        assert facts("full_precision") == facts("full_precision", override)
        assert facts("student") != facts("student", override)
    assert facts("quantized_afterwards") == facts("quantized_afterwards", "scheme.after=0.5")
    assert facts("quantized_afterwards") != facts("quantized_afterwards", "scheme.quantize.weights=int8")


def test_a_trained_student_is_taken_as_it_is() -> None:
    full, afterwards, student = _recipe(*PRETRAINED).stages
    assert (full.share_of_steps, full.description) == (0.0, "a/b as it is")
    assert full.student == _recipe(*PRETRAINED).student
    assert (student.share_of_steps, student.student.tokenizer) == (1.0, "a/b")
    assert afterwards.student.model == "runs/tiny/models/full_precision/model"
    only_own = _recipe(
        *PRETRAINED, "objective=[{name: own, loss: {kind: forward_kl}, targets: [label], teacher: full_precision}]"
    )
    assert [stage.terms for stage in only_own.stages[:2]] == [(), ()], "LLM-QAT: its own self alone teaches it"
    assert _arms(*PRETRAINED)["full_precision"].evaluate_target == "label"


@pytest.mark.parametrize(
    ("match", "overrides"),
    [
        ("Remove `student.lora`", [*PRETRAINED, "student.lora={rank: 4}"]),
        (
            "nothing would teach that model itself",
            ["objective.label.teacher=full_precision", "objective.label.loss={kind: forward_kl}"],
        ),
        ("the student is a fresh one", ["scheme.share_of_steps=0"]),
        ("Rename the one under `teachers`", ["teachers={full_precision: {kind: ema}}"]),
        (r"ablations\.own: \['own'\] learn from `full_precision`", ["evaluate.ablations={own: [label, own]}"]),
        (r"this name is taken", ["evaluate.ablations={quantized_afterwards: [label]}"]),
        (r"'full_precision' is not one of", ["scheme={kind: step_by_step}"]),
        (r"quantize\.group_size", ["scheme.quantize.group_size=1"]),
        (r"quantize\.weights", ["scheme.quantize.weights=int5"]),
        (r"share_of_steps", ["scheme.share_of_steps=1"]),
    ],
)
def test_what_makes_no_sense_is_refused_when_the_recipe_loads(match: str, overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=match):
        _recipe(*overrides)


@pytest.mark.parametrize(
    ("match", "overrides"),
    [
        (r"scheme\.quantize\.group_size: 32 does not divide the width of 14 layers", ["scheme.quantize.group_size=32"]),
        (r"scheme\.quantize\.head: the output head is the matrix of the embeddings", ["scheme.quantize.head=true"]),
        (r"scheme\.quantize\.modules: .*\['attention'\]", ["scheme.quantize.modules=[attention]"]),
        (
            r"scheme\.quantize: GPT2LMHeadModel has no linear layer",
            ["student.config={model_type: gpt2, n_embd: 16, n_head: 2, n_layer: 1}"],
        ),
    ],
)
def test_layers_that_do_not_fit_are_refused_before_anything_is_written(match: str, overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=match):
        check(_recipe("rationales={teacher: {kind: gold}}", *overrides))


def test_torchao_is_asked_for_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_llm.core.extras.is_there", lambda package: package != "torchao")
    with pytest.raises(ConfigError, match=r"scheme\.quantize: .*pip install 'distill-llm\[quantize\]'"):
        check(_recipe())


def test_needs_say_what_integers_take_on_disk(tiny_t5: Callable[..., LoadedModel]) -> None:
    full, afterwards, student = needs_of_stages(_recipe(), tiny_t5().tokenizer)
    assert afterwards.disk == student.disk < 0.6 * full.disk
    assert (afterwards.is_trained, afterwards.checkpoints, student.is_trained) == (False, 0, True)
    assert "not trained" in str(afterwards)
    assert student.teachers == ("full_precision",)
