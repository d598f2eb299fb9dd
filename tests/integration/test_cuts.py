"""Students cut out of teachers through the command line: each recipe in small, and on two processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from distill_llm.evaluation.scorecard import load_scorecard
from tests.conftest import SHOP_WORDS

pytestmark = pytest.mark.slow

SMALL = (
    "train.max_steps=4",
    "train.validate_every=2",
    "train.rows_per_step=16",
    "train.workers=1",
    "train.tune=[]",
    "task={kind: shop, products: 20, train_size: 24, validation_size: 4, test_size: 8}",
    "rationales={teacher: {kind: gold}}",
    "label_from=gold",
    "evaluate.resamples=200",
    "run_dir=small",
)


def _model(folder: Path) -> Any:
    """As anyone loads it: transformers alone."""
    from transformers import AutoModelForSeq2SeqLM

    model, said = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def _numbers(folder: Path) -> int:
    return sum(weight.numel() for weight in _model(folder).parameters())


@pytest.fixture
def big(tmp_path: Path, save_tiny: Any) -> str:
    """The folder of a teacher that is to be cut."""
    return save_tiny("t5", text=SHOP_WORDS, d_model=48, d_kv=12, d_ff=96, num_layers=2)


def test_pruning_in_small(cli: Any, tmp_path: Path, big: str) -> None:
    words = ("recipes/compress/prune-half.yaml", *SMALL, f"student.model={big}", f"teachers.uncut.model={big}")
    examined = " ".join(cli("doctor", *words).stdout.split())
    assert "stage cut_1 label + rationale + soft; cut 1 of 2: " in examined
    assert "stay: 2 + 2 layers, " in examined
    cli("run", *words)
    run = tmp_path / "small"
    card = load_scorecard(run)
    assert {entry.name: entry.role for entry in card.entries} == {
        "cut 1": "assistant",
        "from scratch": "student",
        "one cut": "student",
        "student": "student",
        "labels same steps": "control",
    }
    whole = _numbers(tmp_path / big)
    sizes = {entry.name: entry.parameters or 0 for entry in card.entries}
    assert whole > sizes["cut 1"] > sizes["student"]
    assert {sizes[name] for name in ("student", "one cut", "from scratch", "labels same steps")} == {
        _numbers(run / "models" / "student" / "model")
    }
    assert 0.4 * whole < sizes["student"] <= 0.5 * whole
    facts = json.loads((run / "models" / "labels_same_steps" / "plan.json").read_text())
    assert facts["student"]["cut"]["ratio"] == 0.5, "labels alone learn on the same cut"


def test_teacher_layers_in_small(cli: Any, tmp_path: Path, big: str) -> None:
    words = ("recipes/compress/from-teacher-layers.yaml", *SMALL, f"student.model={big}", f"teachers.big.model={big}")
    cli("run", *words, "train.learning_rate=1e-30", "evaluate.controls=[]")
    run = tmp_path / "small"
    mine, theirs = _model(run / "models" / "student" / "model"), _model(tmp_path / big)
    assert (mine.config.num_layers, mine.config.num_decoder_layers) == (1, 1)
    name = "decoder.block.0.layer.1.EncDecAttention.q.weight"
    assert (mine.get_parameter(name) == theirs.get_parameter(name)).all()


def test_a_cut_is_the_same_on_two_processes(cli: Any, tmp_path: Path, big: str, shop: str) -> None:
    """The main process measures, and the file that it writes is what the other goes by."""
    words = (
        shop,
        f"student={{model: {big}, cut: {{ratio: 0.6, layer_importance: loss}}}}",
        "train.rows_per_batch=8",
        "evaluate.controls=[]",
    )
    cli("generate-rationales", *words, "run_dir=one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    cli("train", *words, "run_dir=one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "distill_llm", "train", *words, "run_dir=two"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, two = ([path.read_text() for path in (tmp_path / name / "cuts").iterdir()] for name in ("one", "two"))
    assert len(one) == 1
    assert one == two
    mine, theirs = (
        load_file(tmp_path / name / "models" / "student" / "model" / "model.safetensors") for name in ("one", "two")
    )
    assert all((mine[name] - theirs[name]).abs().max() < 2e-5 for name in mine)


def test_zeros_in_small(cli: Any, tmp_path: Path, big: str) -> None:
    """Two of each four weights are zero in an ordinary folder; without the scheme none is."""
    words = ("recipes/compress/sparse-2of4.yaml", *SMALL, f"student.model={big}", f"teachers.dense.model={big}")
    cli("run", *words)
    models = tmp_path / "small" / "models"
    card = load_scorecard(tmp_path / "small")
    assert next(one for one in card.entries if one.name == "student").description.endswith(
        "2 of 4 of linear weights zero"
    )
    for arm, zeros in (("student", 2), ("without_zeros", 0)):
        weights = load_file(models / arm / "model" / "model.safetensors")
        attention = [weight for name, weight in weights.items() if "Attention." in name and "bias" not in name]
        assert len(attention) == 24
        assert {int(one) for weight in attention for one in (weight == 0).view(-1, 4).sum(1)} == {zeros}
        _model(models / arm / "model")
