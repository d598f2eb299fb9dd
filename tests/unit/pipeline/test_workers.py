"""Trials side by side: the same weights as one after another, and a failure that reaches the parent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill_llm.core.errors import ConfigError
from distill_llm.core.files import read_json
from distill_llm.core.progress import SILENT
from distill_llm.pipeline.trial import Trial
from distill_llm.pipeline.workers import run_trials
from distill_llm.recipe.load import parse_yaml, recipe_from

YAML = """
name: tiny
task: {kind: shop, products: 20, train_size: 24, validation_size: 4, test_size: 4}
rationales: {teacher: {kind: gold}}
student:
  config: {model_type: t5, d_model: 8, d_kv: 4, d_ff: 16, num_layers: 1, num_heads: 2, dropout_rate: 0.1}
  tokenizer: {kind: words, vocab_size: 128}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}
train: {max_steps: 4, rows_per_step: 8, rows_per_batch: 8, max_input_tokens: 32, max_target_tokens: 8}
evaluate: {controls: [labels_same_steps]}
"""


@pytest.fixture
def trials(planned: Any, tmp_path: Path) -> Any:
    """Builds the trials of student and control in a folder of their own."""
    recipe = recipe_from(parse_yaml(YAML, "tiny"), [f"run_dir={tmp_path / 'run'}"])
    run, material, plan = planned(recipe)

    def build(folder: str, **changes: Any) -> list[Trial]:
        return [
            Trial(
                arm=arm,
                learning_rate=1e-2,
                recipe=recipe,
                rows=arm.rows_of(plan.rows.rows),
                validation=material.splits.validation,
                tokenizer=changes.get(arm.name, run.tokenizer),
                folder=tmp_path / folder / arm.name,
            )
            for arm in plan.arms
        ]

    return build


def _weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def _without_seconds(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in result.items() if key != "seconds"} for result in results]


@pytest.mark.slow
def test_two_workers_train_what_one_does(trials: Any) -> None:
    alone, together = trials("alone"), trials("together")
    one_by_one, side_by_side = run_trials(alone, 1, SILENT), run_trials(together, 2, SILENT)
    assert _without_seconds(side_by_side) == _without_seconds(one_by_one)
    assert [trial.arm.name for trial in alone] == ["student", "labels_same_steps"]
    for first, second in zip(alone, together, strict=True):
        assert _weights(first.folder) == _weights(second.folder)
    assert _weights(alone[0].folder) != _weights(alone[1].folder)


@pytest.mark.slow
def test_failure_in_a_worker_is_raised_and_the_other_training_goes_on_later(trials: Any, tmp_path: Path) -> None:
    alone, broken = trials("alone")[:1], trials("broken", labels_same_steps=tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"student\.tokenizer: there is no folder '.*gone'"):
        run_trials(broken, 2, SILENT)
    assert _without_seconds(run_trials(broken[:1], 1, SILENT)) == _without_seconds(run_trials(alone, 1, SILENT))
    assert _weights(broken[0].folder) == _weights(alone[0].folder)


def test_finished_trial_is_not_trained_again(trials: Any) -> None:
    once = trials("once")[:1]
    first = run_trials(once, 1, SILENT)
    (once[0].folder / "model" / "model.safetensors").unlink()
    assert run_trials(once, 1, SILENT) == first == [read_json(once[0].folder / "trained.json")]
    assert not (once[0].folder / "model" / "model.safetensors").exists()
