"""The command line on a CUDA device: a recipe is examined, its cache written, its student trained and scored there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TEXT = (
    "predict explain reason : . + = > < ? ann bob carl dora emil fay gus hana buys and who pays more "
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"
)
TAUGHT = """\
  - {name: soft, loss: {kind: forward_kl, temperature: 2.0}, targets: [label, rationale], teacher: big}
  - {name: hint, loss: {kind: hint}, targets: [rationale], teacher: big, weight: 0.1, until: 0.5}
teachers:
  big: {kind: frozen, model: ./FAMILY}
  kept: {kind: cached, of: big, payload: {kind: last_hidden, dtype: float32}}
  words: {kind: cached, of: big, payload: {kind: top_k, k: 16}}
  some: {kind: cached, of: big, payload: {kind: sampled, samples: 12}}
  own: {kind: ema}
"""
LLAMA = "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 4}"
VISIBLE = {"CUDA_VISIBLE_DEVICES": "0", "timeout": 120}


@pytest.fixture
def recipe(request: pytest.FixtureRequest, shop: str, save_tiny: Any, tmp_path: Path) -> str:
    """The small recipe for a student of each family, with every kind of teacher of signals."""
    family = request.param
    save_tiny(family, text=TEXT, seed=5)
    text = (tmp_path / shop).read_text().replace("train:\n", TAUGHT.replace("FAMILY", family) + "train:\n", 1)
    text = text.replace("evaluate: {", "evaluate: {controls: [], ")
    text = text.replace("tokenizer: {kind: words, vocab_size: 256}", f"tokenizer: ./{family}")
    if family == "llama":
        start = text.index("  config:")
        text = text[:start] + f"  config: {LLAMA}\n" + text[text.index("\n", start) + 1 :]
    (tmp_path / "gpu.yaml").write_text(text)
    return "gpu.yaml"


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "models/student/model/model.safetensors")


@pytest.mark.parametrize("recipe", ["t5", "llama"], indirect=True)
def test_a_recipe_runs_on_the_device(cli: Any, recipe: str, tmp_path: Path) -> None:
    """`doctor` takes the measure of a step there, `run` trains and scores there, with hints and a teacher beside."""
    shown = cli("doctor", recipe, COLUMNS="300", **VISIBLE).stdout
    assert "MiB on the GPU, weights and teachers included" in shown
    assert "a training computes in bfloat16: this GPU has bfloat16" in shown
    said = cli("run", recipe, "run_dir=run", **VISIBLE).stdout
    assert "computes in bfloat16" in said
    result = json.loads((tmp_path / "run/models/student/result.json").read_text())
    assert result["precision"] == "bfloat16"
    assert torch.cuda.get_device_name() in (tmp_path / "run/scorecard.md").read_text()
    assert all(bool(weight.isfinite().all()) for weight in _weights(tmp_path / "run").values())


@pytest.mark.parametrize(
    ("recipe", "teacher", "loss"),
    [
        ("llama", "kept", "jensen_shannon"),
        ("t5", "words", "reverse_kl"),
        ("llama", "some", "forward_kl"),
        ("t5", "own", "forward_kl"),
    ],
    indirect=["recipe"],
)
def test_each_kind_of_teacher_teaches_on_the_device_what_it_teaches_on_a_cpu(
    cli: Any, recipe: str, tmp_path: Path, teacher: str, loss: str
) -> None:
    """In float32. Both read the cache that was written on the device: drawn words may differ by rounding."""
    taught = [
        f"objective.soft.teacher={teacher}",
        f"objective.soft.loss={{kind: {loss}, temperature: 2.0}}",
        "objective.hint.weight=0.001",
        "train.precision=float32",
        "student.config.dropout_rate=0" if "t5" in (tmp_path / recipe).read_text() else "train.max_steps=8",
    ]
    found = []
    for place, visible in (("gpu", VISIBLE), ("cpu", {})):
        words = [recipe, *taught, f"run_dir={place}"]
        if teacher in ("kept", "words", "some"):
            words.append(f"teachers.{teacher}.folder={tmp_path / 'cache'}")
        cli("generate-rationales", *words, **visible)
        cli("cache-signals", *words, **visible)
        cli("train", *words, **visible)
        found.append(_weights(tmp_path / place))
    gpu, cpu = found
    for name, weight in cpu.items():
        torch.testing.assert_close(gpu[name], weight, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(("recipe", "load_in"), [("llama", "8bit"), ("t5", "4bit")], indirect=["recipe"])
def test_a_teacher_of_few_bits_is_run_beside_the_student(cli: Any, recipe: str, tmp_path: Path, load_in: str) -> None:
    pytest.importorskip("bitsandbytes")
    cli("run", recipe, f"teachers.big.load_in={load_in}", "run_dir=few", "objective.hint.until=1", **VISIBLE)
    assert all(bool(weight.isfinite().all()) for weight in _weights(tmp_path / "few").values())


def test_a_teacher_of_text_writes_in_continuous_batches(cli: Any, shop: str, save_tiny: Any, tmp_path: Path) -> None:
    """By itself, as a decoder-only model on a GPU does; the same texts as in static batches, in float32."""
    save_tiny("llama", text=TEXT, seed=5)
    texts = []
    for batching in ("auto", "static"):
        teacher = (
            f"rationales={{teacher: {{kind: transformers, model: ./llama, dtype: float32, batching: {batching}}}, "
            "sampling: {max_new_tokens: 8}, keep: [], prompt: {num_exemplars: 0}}"
        )
        cli("generate-rationales", shop, teacher, f"run_dir={batching}", **VISIBLE)
        journal = (tmp_path / batching / "rationales/journal.jsonl").read_text().splitlines()
        texts.append(sorted(line for line in journal if line))
    assert len(texts[0]) > 60
    same = sum(one == other for one, other in zip(*map(_completions, texts), strict=True))
    assert same >= 0.97 * len(texts[0]), "a tie between two words may be broken otherwise"


def _completions(lines: list[str]) -> list[str]:
    found = {}
    for line in lines:
        entry = json.loads(line)
        found[entry["key"]] = json.dumps(entry.get("text", entry), sort_keys=True)
    return [found[key] for key in sorted(found)]
