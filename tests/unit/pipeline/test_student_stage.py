"""The plan of a training: its tokenizer is that of the recipe that is trained, not of an attempt that failed before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill_llm.core.errors import ConfigError, DataError
from distill_llm.core.files import read_json
from distill_llm.core.progress import SILENT
from distill_llm.models.load import read_tokenizer
from distill_llm.pipeline.plan_facts import settle
from distill_llm.pipeline.run import run as run_recipe
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.student_stage import Plan, train_arms
from distill_llm.recipe.load import parse_yaml, recipe_from

YAML = """
name: tiny
task: {kind: shop, products: 20, train_size: 24, validation_size: 4, test_size: 4}
rationales: {teacher: {kind: gold}}
student:
  config: {model_type: t5, d_model: 8, d_kv: 4, d_ff: 16, num_layers: 1, num_heads: 2}
  tokenizer: {kind: words, vocab_size: 256}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}
train: {max_steps: 2, rows_per_step: 8, rows_per_batch: 8}
evaluate: {controls: []}
"""


@pytest.fixture
def plan(planned: Any, tmp_path: Path) -> Any:
    """Plans the recipe with overrides, always in the same run folder; ``train=True`` trains too."""

    def build(*overrides: str, train: bool = False) -> tuple[RunFolder, Plan]:
        recipe = recipe_from(parse_yaml(YAML, "tiny"), [f"run_dir={tmp_path / 'run'}", *overrides])
        run, material, made = planned(recipe)
        settle(recipe, made.arms, run, retrain=False)
        if train:
            train_arms(recipe, material, made, run, ["all"], SILENT)
        return run, made

    return build


def _knows(run: RunFolder, word: str) -> bool:
    return word in read_tokenizer(str(run.tokenizer), where="test").get_vocab()


def test_tokenizer_of_a_failed_attempt_is_made_anew(plan: Any) -> None:
    """A rule that keeps nothing: words of rationales only come in once it is loosened."""
    with pytest.raises(DataError, match="the target 'rationale' has no row"):
        plan("rationales.keep=[{kind: max_rationale_tokens, tokens: 1}]")
    run, _ = plan()
    assert _knows(run, ">")
    assert _knows(run, "ann")


def test_tokenizer_stays_once_training_has_begun(plan: Any) -> None:
    run, _ = plan(train=True)
    before = (run.tokenizer / "tokenizer.json").stat().st_mtime_ns
    plan("evaluate.batch_rows=3")
    assert (run.tokenizer / "tokenizer.json").stat().st_mtime_ns == before


def test_trained_arm_is_kept_and_another_plan_of_it_refused(plan: Any) -> None:
    ablation = "evaluate.ablations={{part: [{}]}}"
    run, _ = plan(ablation.format("label"), train=True)
    weights = (run.model("part") / "model.safetensors").stat().st_mtime_ns
    plan(ablation.format("label"), train=True)
    assert (run.model("part") / "model.safetensors").stat().st_mtime_ns == weights
    assert read_json(run.result("part"))["description"] == "label"
    with pytest.raises(
        ConfigError, match=r"planned otherwise, and would be trained anew: part\.\nThese stay as they are: student\."
    ):
        plan(ablation.format("rationale"), train=True)


def _unlabelled(tmp_path: Path) -> list[str]:
    """Overrides: twenty questions without labels, and a teacher's texts for them."""
    rows = [{"id": str(i), "question": f"is {i} even ?"} for i in range(20)]
    texts = [f"{i} has two halves . The answer is {'no' if i % 2 else 'yes'}." for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    task = {
        "kind": "jsonl",
        "data": str(tmp_path / "rows.jsonl"),
        "fields": {"id": "id", "input": "question", "label": None},
    }
    teacher = {"kind": "replay", "files": {"train": str(tmp_path / "texts.json")}}
    return [
        f"task={json.dumps(task)}",
        f"rationales.teacher={json.dumps(teacher)}",
        "label_from=teacher",
        "evaluate.teacher=false",
    ]


RATIONALES_ALONE = (
    "label_from=gold",  # so that no votes stand in for the labels that are not there
    "objective=[{name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}]",
)


def test_without_validation_labels_the_last_step_is_kept(plan: Any, tmp_path: Path) -> None:
    """An accuracy of nothing would be 0 at every checkpoint, and the first one would win."""
    run, _ = plan(*_unlabelled(tmp_path), *RATIONALES_ALONE, "train.max_steps=3", "train.validate_every=1", train=True)
    result = read_json(run.result("student"))
    assert result["validation_accuracy"] is None
    assert result["best_step"] == result["steps"] == 3


def test_without_validation_labels_nothing_can_be_tuned(plan: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.tune: no validation example has a label"):
        plan(*_unlabelled(tmp_path), *RATIONALES_ALONE, "train.tune=[1e-3, 1e-2]", train=True)


@pytest.mark.parametrize("label_from", ["teacher", "gold_else_teacher"])
def test_votes_choose_where_validation_has_no_labels(plan: Any, tmp_path: Path, label_from: str) -> None:
    run, _ = plan(*_unlabelled(tmp_path), f"label_from={label_from}", "train.tune=[1e-3, 1e-2]", train=True)
    result = read_json(run.result("student"))
    assert [trial["learning_rate"] for trial in result["trials"]] == [1e-3, 1e-2]
    assert 0 <= result["validation_accuracy"] <= 1


def test_unlabelled_test_data_is_said_before_anything_is_written(tmp_path: Path) -> None:
    overrides = [f"run_dir={tmp_path / 'run'}", *_unlabelled(tmp_path)]
    with pytest.raises(DataError, match="the test split has examples without a label"):
        run_recipe(recipe_from(parse_yaml(YAML, "tiny"), overrides))
    assert not (tmp_path / "run").exists()


def test_seed_of_training_draws_weights_and_order_and_no_data(plan: Any) -> None:
    """With the recipe's seed written out, the same bytes; with another, other weights of the same rows."""
    made = []
    for number, word in enumerate(("train.seed=recipe", "train.seed=17", "train.seed=18")):
        run, planned = plan(word, f"name=n{number}", train=True)
        made.append((planned.rows.rows, (run.model("student") / "model.safetensors").read_bytes()))
        shutil.rmtree(run.root)
    (rows, weights), (same_rows, same), (other_rows, other) = made
    assert rows == same_rows == other_rows
    assert weights == same != other
