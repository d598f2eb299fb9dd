"""What stages need of disk and memory, beside what real models, files and optimisers take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill_llm.models.load import build_student, load_tokenizer
from distill_llm.pipeline.needs import needs_of_stages, summary_of
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.training.arguments import make_optimizer

YAML = """
name: tiny
task: {kind: shop}
rationales: {teacher: {kind: gold}}
student:
  config: {model_type: t5, d_model: 8, d_kv: 4, d_ff: 16, num_layers: 1, num_heads: 2}
  tokenizer: {kind: words, vocab_size: 128}
teachers: {big: {kind: frozen, model: FOLDER}}
scheme:
  kind: assistant_chain
  teacher: big
  guidance: GUIDANCE
  assistants: [{name: middle, config: {d_model: 12, d_ff: 24}}]
objective:
  - {name: soft, loss: {kind: forward_kl}, targets: [label, rationale], teacher: big}
train: {max_steps: 2, rows_per_step: 8, rows_per_batch: 8, optimizer: OPTIMIZER}
"""


def _recipe(tmp_path: Path, tiny_t5: Any, guidance: str = "nearest", optimizer: str = "adamw", **changes: Any) -> Any:
    big = tiny_t5(seed=1, d_model=24)
    big.model.save_pretrained(tmp_path / "big")
    text = YAML.replace("FOLDER", str(tmp_path / "big")).replace("GUIDANCE", guidance).replace("OPTIMIZER", optimizer)
    overrides = [f"{key}={value}" for key, value in changes.items()]
    return recipe_from(parse_yaml(text, "tiny"), [f"run_dir={tmp_path / 'run'}", *overrides]), big


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_it_is_what_a_training_takes(tmp_path: Path, tiny_t5: Any, optimizer: str) -> None:
    """Numbers of weights, gradients and states after one step; the file's size, but for its header."""
    recipe, _ = _recipe(tmp_path, tiny_t5, optimizer=optimizer)
    tokenizer = load_tokenizer(recipe.student, ["who pays more ? ann bob"])
    for stage, needs in zip(recipe.stages, needs_of_stages(recipe, tokenizer), strict=True):
        model = build_student(stage.student, tokenizer).model
        made = make_optimizer(model, recipe.train)
        ids = torch.tensor([[3, 4, 5]])
        model(input_ids=ids, labels=ids).loss.backward()
        made.step()
        numbers = sum(weight.numel() + weight.grad.numel() for weight in model.parameters())
        for state in made.state.values():
            numbers += sum(one.numel() for one in state.values() if torch.is_tensor(one) and one.dim() > 0)
        model.save_pretrained(tmp_path / stage.name)
        assert needs.parameters == sum(weight.numel() for weight in model.parameters())
        assert needs.training == 4 * numbers
        saved = (tmp_path / stage.name / "model.safetensors").stat().st_size
        assert needs.disk <= saved <= needs.disk + 8000


def test_teachers_are_counted_beside_each_stage(tmp_path: Path, tiny_t5: Any) -> None:
    recipe, big = _recipe(tmp_path, tiny_t5, "ensemble")
    tokenizer = load_tokenizer(recipe.student, ["who pays more ? ann bob"])
    middle, student = needs_of_stages(recipe, tokenizer)
    assert (middle.teachers, middle.beside) == (("big",), 4 * big.num_parameters)
    assert (student.teachers, student.beside) == (("big", "middle"), 4 * (big.num_parameters + middle.parameters))
    said, fits = summary_of([middle, student], tmp_path / "run")
    assert fits
    assert said.startswith("2 stages, one after the other: at most ")
    assert "MORE THAN the" in summary_of([middle, student, *[_huge(student)]], tmp_path / "run")[0]


def _huge(needs: Any) -> Any:
    from dataclasses import replace

    return replace(needs, disk=10**18)


def test_rates_that_are_tried_have_checkpoints_each(tmp_path: Path, tiny_t5: Any) -> None:
    recipe, _ = _recipe(tmp_path, tiny_t5)
    tuned, _ = _recipe(tmp_path, tiny_t5, **{"train.tune": "[1e-3, 1e-2]"})
    tokenizer = load_tokenizer(recipe.student, ["who pays more ? ann bob"])
    one, two = (needs_of_stages(each, tokenizer)[0].checkpoints for each in (recipe, tuned))
    assert two == 2 * one
