"""Prefixes on the decoder's side and packed rows, through the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from distill_llm.pipeline.rationale_stage import check
from distill_llm.recipe.load import load_recipe

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow
LLAMA = "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"


def test_a_student_is_told_its_target_on_the_decoder_s_side(cli: Any, shop: str, tmp_path: Path, lines: Any) -> None:
    """It answers as plain transformers has it answer, in the way that docs/training.md shows."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    said = cli("run", shop, "student.prefix_side=decoder", "train.max_steps=40", "evaluate.controls=[]").stdout
    assert "computes in float32" in said
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "models" / "student" / "result.json").read_text())["precision"] == "float32"
    folder = run / "models" / "student" / "model"
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prefix = tokenizer("predict:", add_special_tokens=False).input_ids
    start = torch.tensor([[model.config.decoder_start_token_id, *prefix]])
    tests = check(load_recipe(tmp_path / shop)).test
    for example, predicted in zip(tests[:6], lines(run / "predictions" / "student.jsonl"), strict=False):
        inputs = tokenizer(example.input, return_tensors="pt")
        written = model.generate(**inputs, decoder_input_ids=start, max_new_tokens=4)
        assert written[0, : start.size(1)].tolist() == start[0].tolist()
        assert predicted["example_id"] == example.id
        assert tokenizer.decode(written[0, start.size(1) :], skip_special_tokens=True).strip() == predicted["text"]
        assert predicted["text"]
    shown = cli("doctor", shop, "student.prefix_side=decoder").stdout
    assert "->  predict : |" in shown
    assert "a training computes in float32" in shown


def test_a_decoder_only_student_has_one_side(cli: Any, shop: str) -> None:
    refused = cli("train", shop, f"student.config={LLAMA}", "student.prefix_side=decoder", expect=2)
    assert "student.prefix_side: 'decoder' needs an encoder-decoder" in refused.stderr


@pytest.mark.parametrize(
    ("options", "ways"),
    [
        ((f"student.config={LLAMA}", "train.optimizer=adamw", "train.learning_rate=1e-2"), ("always", "never")),
        (("student.prefix_side=decoder", "student.config.dropout_rate=0"), ("auto", "never")),
    ],
)
def test_packing_changes_no_training(
    options: tuple[str, ...], ways: tuple[str, str], cli: Any, shop: str, tmp_path: Path
) -> None:
    weights = []
    for way in ways:
        cli("generate-rationales", shop, f"run_dir={way}")
        cli("train", shop, *options, f"train.packing={way}", f"run_dir={way}")
        weights.append(load_file(tmp_path / way / "models" / "student" / "model" / "model.safetensors"))
    one, other = weights
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(one[name], other[name]) for name in one), "the two ways are two"
