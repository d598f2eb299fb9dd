"""Captured teachers through the command line: rationales, then a training without their teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.test_cache import TEXT, in_two_processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WORDS = (
    "rationales={teacher: {kind: transformers, model: ./t5}, keep: []}",
    "rationales.sampling={temperature: 1.0, max_new_tokens: 12, top_logprobs: 4}",
    "student.tokenizer=./words",
    "teachers={heard: {kind: captured}}",
    "evaluate={controls: [], teacher: false}",
)
TERM = "  - {name: soft, loss: {kind: forward_kl}, targets: [rationale], teacher: heard}\ntrain:\n"


@pytest.fixture
def recipe(shop: str, save_tiny: Any, tmp_path: Path) -> str:
    save_tiny("t5", text=TEXT, seed=5)
    shutil.copytree(tmp_path / "t5", tmp_path / "words", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    text = (tmp_path / shop).read_text().replace("train:\n", TERM, 1)
    (tmp_path / "captured.yaml").write_text(f"{text}teachers: {{heard: {{kind: captured}}}}\n")
    return "captured.yaml"


def test_a_student_is_trained_without_the_model_that_was_heard(cli: Any, recipe: str, tmp_path: Path) -> None:
    assert "captured heard" in cli("doctor", recipe, *WORDS, COLUMNS="200").stdout
    cli("generate-rationales", recipe, *WORDS)
    said = cli("doctor", recipe, *WORDS, COLUMNS="200").stdout
    assert "captured heard" in said
    assert "soft" in said
    assert not (tmp_path / "runs/tiny/signals").exists()
    for weights in (tmp_path / "t5").glob("*.safetensors"):
        weights.unlink()
    cli("train", recipe, *WORDS)
    assert (tmp_path / "runs/tiny/models/student/model/config.json").exists()
    (state,) = (tmp_path / "runs/tiny/models/student").rglob("result.json")
    assert json.loads(state.read_text())["terms"][2]["teacher"] == "heard"

    shutil.rmtree(tmp_path / "t5")
    line = next(
        line for line in cli("cache-signals", recipe, *WORDS, COLUMNS="200").stdout.splitlines() if "heard " in line
    )
    assert line.split()[1] == line.split()[2], "what is there is not written again, and needs no teacher"
    assert line.split()[6].endswith("%")


def test_two_processes_learn_what_one_does(cli: Any, recipe: str, tmp_path: Path) -> None:
    """The rows' signals, written by the main process, are found by both."""
    words = (recipe, *WORDS, "student.config.dropout_rate=0.0", "train.rows_per_batch=8")
    for run in ("one", "two"):
        cli("generate-rationales", *words, f"run_dir={run}")
    cli("train", *words, "run_dir=one")
    in_two_processes(tmp_path, "train", *words, "run_dir=two")
    one, two = (load_file(tmp_path / run / "models/student/model/model.safetensors") for run in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=1e-3)


def test_what_was_not_asked_for_is_an_error_before_anything(cli: Any, recipe: str, tmp_path: Path) -> None:
    refused = cli("doctor", recipe, *WORDS, "rationales.sampling.top_logprobs=0", expect=2)
    assert "teachers.heard: rationales.sampling.top_logprobs is 0" in refused.stderr
    assert not (tmp_path / "runs").exists()
