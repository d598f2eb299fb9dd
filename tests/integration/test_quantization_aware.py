"""Quantization-aware distillation through the command line: the recipe in small, and a model on its way to a Hub."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill_llm.evaluation.scorecard import load_scorecard
from tests.conftest import SHOP_WORDS
from tests.hub_server import TOKEN, HubServer

pytestmark = pytest.mark.slow

SMALL = (
    "train.max_steps=8",
    "train.validate_every=2",
    "train.rows_per_step=16",
    "task={kind: shop, products: 20, train_size: 24, validation_size: 4, test_size: 8}",
    "rationales={teacher: {kind: gold}}",
    "label_from=gold",
    "evaluate.controls=[]",
    "evaluate.resamples=200",
    "teachers.big.model=t5",
    "student.tokenizer=t5",
)


def test_the_recipe_in_small(cli: Callable[..., Any], tmp_path: Path, save_tiny: Any) -> None:
    save_tiny("t5", text=SHOP_WORDS, d_model=48, d_ff=96)
    words = ("recipes/compress/qat-int4.yaml", "run_dir=small", *SMALL)
    examined = " ".join(cli("doctor", *words).stdout.split())
    assert "teacher full_precision a stage, not trained yet: its terms are not looked at below" in examined
    done = cli("run", *words)
    assert "Failed to load" not in done.stderr + done.stdout, "torchao's own talk"
    card = load_scorecard(tmp_path / "small")
    entries = {entry.name: entry for entry in card.entries}
    assert entries.keys() == {
        "student",
        "full precision",
        "quantized afterwards",
        "full precision longer",
        "longer quantized afterwards",
    }
    assert len({entry.parameters for entry in entries.values()}) == 1, "quantized weights count as those they stand for"
    small, whole = entries["student"], entries["full precision"]
    assert (small.bytes or 0) < 0.6 * (whole.bytes or 0)
    assert small.bytes == (tmp_path / "small/models/student/model/model.safetensors").stat().st_size
    steps = {
        name: json.loads((tmp_path / "small" / "models" / name / "result.json").read_text())["steps"]
        for name in ("full_precision", "quantized_afterwards", "full_precision_longer", "student")
    }
    assert steps == {"full_precision": 6, "quantized_afterwards": 0, "full_precision_longer": 2, "student": 2}
    config = json.loads((tmp_path / "small/models/student/model/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"

    refused = cli("run", *words, "run_dir=other", "student={model: small/models/student/model}", expect=2).stderr
    assert "are quantized (torchao), and cannot be trained on" in " ".join(refused.split())


def test_a_chain_down_to_sixteen_times_in_small(cli: Callable[..., Any], tmp_path: Path, save_tiny: Any) -> None:
    save_tiny("t5", text=SHOP_WORDS, d_model=48, d_ff=96)
    cli("run", "recipes/compress/sixteen-times.yaml", "run_dir=small", *SMALL, "train.rows_per_batch=16")
    entries = {entry.name: entry for entry in load_scorecard(tmp_path / "small").entries}
    assert entries.keys() == {"student", "full precision", "quantized afterwards"}
    assert entries["student"].bytes == entries["quantized afterwards"].bytes
    assert (entries["student"].bytes or 0) < 0.6 * (entries["full precision"].bytes or 0)


def test_a_trained_decoder_only_model_in_small(cli: Callable[..., Any], tmp_path: Path, save_tiny: Any) -> None:
    """Its head shares the matrix of its words, and it is its only teacher."""
    save_tiny("llama", text=SHOP_WORDS, tie_word_embeddings=True)
    small = [words for words in SMALL if not words.startswith(("teachers", "student"))]
    cli("run", "recipes/compress/qat-int8-qwen.yaml", "run_dir=small", *small, "student.model=llama")
    models = tmp_path / "small" / "models"
    assert json.loads((models / "full_precision" / "result.json").read_text())["steps"] == 0
    assert json.loads((models / "student" / "result.json").read_text())["steps"] == 8
    config = json.loads((models / "student" / "model" / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert config["quantization_config"]["quant_method"] == "torchao"


def test_a_pushed_quantized_model_answers_as_its_scorecard_says(
    cli: Callable[..., Any], shop: str, tmp_path: Path
) -> None:
    llama = "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"
    words = (
        shop,
        f"student.config={llama}",
        "train.optimizer=adamw",
        "scheme={kind: quantization_aware, after: 0.5, quantize: {weights: int8, activations: full, group_size: row}}",
        "evaluate.controls=[]",
    )
    cli("run", *words)
    with HubServer(tmp_path / "hub") as hub:
        online = {**hub.environment(token=TOKEN), "HF_HUB_OFFLINE": None, "HF_DATASETS_OFFLINE": None}
        cli("push", "runs/tiny", "--repo-id", "ann/small", **online)
        card = (tmp_path / "runs/tiny/hub/student/README.md").read_text()
        assert "pip install torchao" in card
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=hub.environment(token=TOKEN),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    first = json.loads((tmp_path / "runs/tiny/predictions/student.jsonl").read_text().splitlines()[0])
    assert done.stdout.rstrip("\n") == first["text"]
