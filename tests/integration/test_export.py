"""Students in other runtimes, from the command line; and the programs of docs/shipping.md that run them there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import TOKEN, HubServer

pytestmark = pytest.mark.slow

_DOCS = Path(__file__).resolve().parents[2] / "docs" / "shipping.md"
_LLAMA = (
    "student={config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
    "num_attention_heads: 2}, tokenizer: {kind: bytes_bpe, vocab_size: 300}}"
)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        yield server


def _reports(run: Path) -> dict[str, Any]:
    return {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in run.glob("exports/student/*/report.json")
    }


def _program(title: str, folder: Path, text: str) -> str:
    """What the program of that name in the docs prints for another folder and another text."""
    blocks = re.findall(r"```python\n(.*?)```", _DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if block.startswith(f"# {title}\n"))
    code, folders = re.subn(r'^folder = ".*"$', f"folder = {str(folder)!r}", code, flags=re.MULTILINE)
    code, texts = re.subn(r'^text = ".*"$', f"text = {text!r}", code, flags=re.MULTILINE)
    assert (folders, texts) == (1, 1)
    code, limits = re.subn(r"range\(64\)", "range(4)", code)  # as the recipe's evaluate.max_new_tokens
    assert limits == 1
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    return done.stdout.strip()


def _first(run: Path, lines: Callable[[Path], list[Any]]) -> tuple[str, str]:
    """The first test example as the student reads it, and what it was scored by."""
    from distill_llm.pipeline.rationale_stage import load_examples
    from distill_llm.pipeline.run_folder import open_run

    _, recipe = open_run(run)
    example = load_examples(recipe).test[0]
    return recipe.student.prefixes.of("label") + example.input, lines(run / "predictions" / "student.jsonl")[0]["text"]


def test_onnx_runtime_answers_as_the_student(cli: Callable[..., Any], shop: str, tmp_path: Path, lines: Any) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    cli("run", shop, "train.max_steps=30", "train.validate_every=30", "evaluate.controls=[]")
    cli("export", "runs/tiny", "--format", "onnx")
    run = tmp_path / "runs" / "tiny"
    report = _reports(run)["onnx"]
    assert (report["num_examples"], report["same_answers"], report["loss"]["points"]) == (24, 1.0, 0.0)
    text, answer = _first(run, lines)
    assert _program("onnx, encoder-decoder", run / "exports/student/onnx", text) == answer


def test_openvino_answers_as_the_student(cli: Callable[..., Any], shop: str, tmp_path: Path, lines: Any) -> None:
    pytest.importorskip("openvino", reason="needs the extra export")
    changes = [_LLAMA, "train.optimizer=adamw", "train.max_steps=30", "train.validate_every=30"]
    cli("run", shop, *changes, "evaluate.controls=[]")
    cli("export", "runs/tiny", "--format", "openvino", "--format", "gguf")
    run = tmp_path / "runs" / "tiny"
    reports = _reports(run)
    assert {name: one["same_answers"] for name, one in reports.items()} == {"openvino": 1.0, "gguf": 1.0}
    text, answer = _first(run, lines)
    assert _program("openvino, decoder-only", run / "exports/student/openvino", text) == answer


def test_int8_in_onnx_runtime_is_smaller_and_is_reported(cli: Callable[..., Any], shop: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    wide = _LLAMA.replace("hidden_size: 16", "hidden_size: 256")
    cli("run", shop, wide, "train.optimizer=adamw", "evaluate.controls=[]")
    cli("export", "runs/tiny", "--format", "onnx-int8", "--examples", "10")
    report = _reports(tmp_path / "runs" / "tiny")["onnx-int8"]
    assert report["num_examples"] == 10
    assert report["export"]["bytes"] < 0.4 * report["student"]["bytes"]


def test_exports_are_pushed_with_their_table(
    hub: HubServer, cli: Callable[..., Any], shop: str, tmp_path: Path
) -> None:
    online = {**hub.environment(token=TOKEN), "HF_HUB_OFFLINE": None, "HF_DATASETS_OFFLINE": None}
    cli("run", shop, "evaluate.controls=[]")
    pushed = ["push", "runs/tiny", "--repo-id", "ann/tiny", "--exports"]
    assert "nothing of 'student' is exported yet. Type: distill-llm export" in cli(*pushed, expect=2, **online).stderr
    asked = ["export", "runs/tiny", "--format", "safetensors-bfloat16"]
    shown = cli(*asked, COLUMNS="120").stdout
    assert "safetensors-bfloat16: writing" in shown
    assert "points lost" in shown
    cli(*pushed, **online)
    repository = hub.repositories["model", "ann/tiny"]
    assert len(repository.commits) == 2, "the Hub's own, and one of ours"
    sent = repository.contents()
    folder = tmp_path / "runs/tiny/exports/student/safetensors-bfloat16"
    for path in folder.iterdir():
        assert sent[f"exports/safetensors-bfloat16/{path.name}"] == path.read_bytes()
    card = sent["README.md"].decode()
    assert "## Other formats" in card
    assert "| safetensors-bfloat16 |" in card
    assert "`exports/" not in card.split("In this repository")[1].split("\n")[0]


def test_what_cannot_be_exported_is_one_error(cli: Callable[..., Any]) -> None:
    assert "Did you mean 'onnx'" in cli("export", "runs/tiny", "--format", "onyx", expect=2).stderr
    assert "Missing option '--format'" in cli("export", "runs/tiny", expect=2).stderr
