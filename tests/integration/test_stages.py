"""Schemes with stages through the command line: killed between and inside stages, changed, and each recipe in small."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distill_llm.evaluation.scorecard import load_scorecard
from tests.conftest import SHOP_WORDS

pytestmark = pytest.mark.slow

CHAIN = """
teachers: {big: {kind: frozen, model: t5}}
scheme:
  kind: assistant_chain
  teacher: big
  guidance: dense
  assistants: [{name: middle, config: {d_ff: 48}}]
"""
SOFT = "objective=[{name: label, loss: {kind: cross_entropy}, targets: [label]}, {name: soft, loss: {kind: forward_kl}, targets: [label, rationale], teacher: big}]"  # noqa: E501


@pytest.fixture
def chain(tmp_path: Path, shop: str, save_tiny: Any) -> tuple[str, ...]:
    """The words that run a small chain; its teacher is a folder."""
    save_tiny("t5", text=SHOP_WORDS)
    (tmp_path / shop).write_text((tmp_path / shop).read_text() + CHAIN)
    return shop, "student.tokenizer=t5", SOFT, "evaluate.controls=[]"


def _wait(process: Any, there: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, f"finished too early\n{process.communicate()}"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _kill(process: Any) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)


def test_stages_that_are_killed_go_on_at_the_first_unfinished_one(
    cli: Any, start: Any, chain: tuple[str, ...], tmp_path: Path
) -> None:
    long = (*chain, "train.max_steps=60", "train.validate_every=5", "task.validation_size=2", "scheme.drop=0.3")
    cli("run", *long, "run_dir=whole")
    models = tmp_path / "torn" / "models"
    words = ("run", *long, "run_dir=torn")

    process = start(*words)  # inside the first stage
    _wait(process, lambda: list(models.glob("middle/rate-*/checkpoints/checkpoint-*/trainer_state.json")))
    _kill(process)
    assert not (models / "middle" / "result.json").exists()

    process = start(*words)  # between the two
    _wait(process, (models / "middle" / "result.json").exists)
    _kill(process)
    middle = (models / "middle" / "model" / "model.safetensors").stat().st_mtime_ns

    process = start(*words)  # inside the second one
    _wait(process, lambda: list(models.glob("student/rate-*/checkpoints/checkpoint-*/trainer_state.json")))
    _kill(process)
    assert not (models / "student" / "result.json").exists()

    cli(*words)
    assert (models / "middle" / "model" / "model.safetensors").stat().st_mtime_ns == middle, "trained once"
    for name in ("models/middle/model/model.safetensors", "models/student/model/model.safetensors"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_changed_stage_is_trained_anew_with_what_comes_after_it(
    cli: Any, chain: tuple[str, ...], tmp_path: Path
) -> None:
    said = cli("run", *chain, "scheme.guidance=ensemble", "evaluate.ablations={direct: [label, soft]}").stdout
    said = " ".join(said.split())
    assert "stage middle: label + soft; taught by big:" in said
    assert "2 stages, one after the other: at most" in said
    assert "wrong answers of 'student'" in said
    run = tmp_path / "runs" / "tiny"
    card = load_scorecard(run)
    assert [entry.role for entry in card.entries] == ["assistant", "student", "student"]
    assert card.avalanche is not None
    assert [link.name for link in card.avalanche.links] == ["big", "middle", "models above", "student"]
    for link, name in zip(
        card.avalanche.links, ("teachers/big", "middle", "teachers/models_above", "student"), strict=True
    ):
        lines = (run / "predictions" / f"{name}.jsonl").read_text().splitlines()
        assert link.wrong == sum(not json.loads(line)["correct"] for line in lines)
    assert "## Error avalanche" in (run / "scorecard.md").read_text()

    weights = {
        name: (run / "models" / name / "model" / "model.safetensors") for name in ("direct", "middle", "student")
    }
    before = {name: path.stat().st_mtime_ns for name, path in weights.items()}
    changed = ("run", *chain, "scheme.guidance=ensemble", "scheme.assistants.middle.config.d_ff=40")
    refused = cli(*changed, expect=2).stderr
    assert "scheme.assistants.0.config.d_ff: 48 there, 40 here" in refused
    assert "would be trained anew: middle, student." in refused
    cli(*changed, "--retrain")
    after = {name: path.stat().st_mtime_ns for name, path in weights.items()}
    assert [name for name in weights if before[name] != after[name]] == ["middle", "student"]
    assert (run / "models" / ".before" / "1" / "middle" / "model" / "model.safetensors").stat().st_mtime_ns == before[
        "middle"
    ]
    cli("run", *chain, "scheme.guidance=ensemble", "scheme.assistants.middle.config.d_ff=40")  # and now it is the run's


SMALL = (
    "train.max_steps=4",
    "train.validate_every=2",
    "train.rows_per_step=16",
    "train.workers=1",
    "task={kind: shop, products: 20, train_size: 24, validation_size: 4, test_size: 8}",
    "rationales={teacher: {kind: gold}}",
    "label_from=gold",
    "evaluate.controls=[]",
    "evaluate.ablations={}",
    "evaluate.resamples=200",
)


@pytest.mark.parametrize(
    ("name", "more", "stages"),
    [
        (
            "chain/nearest",
            ["scheme.assistants=[]", "scheme.derived=2"],
            ["big", "assistant 1", "assistant 2", "student"],
        ),
        ("chain/dense", [], ["big", "large", "middle", "student"]),
        ("chain/ensemble", [], ["big", "large", "middle", "models above", "student"]),
        ("born-again", ["student.tokenizer=t5"], ["generation 0", "generation 1", "student"]),
        ("hint-first", [], []),
    ],
)
def test_each_recipe_in_small(
    cli: Any, tmp_path: Path, save_tiny: Any, name: str, more: list[str], stages: list[str]
) -> None:
    save_tiny("t5", text=SHOP_WORDS, d_model=48, d_ff=96)
    of_teacher = [] if name == "born-again" else ["teachers.big.model=t5", "student.tokenizer=t5"]
    cli("run", f"recipes/{name}.yaml", "run_dir=small", *SMALL, *of_teacher, *more)
    card = load_scorecard(tmp_path / "small")
    assert [link.name for link in card.avalanche.links] == stages if card.avalanche else stages == []
    sizes = [entry.parameters or 0 for entry in card.entries if entry.role == "assistant"]
    assert len(sizes) == len([stage for stage in stages if stage not in ("big", "models above", "student")])
    if name == "hint-first":
        hints = json.loads((tmp_path / "small" / "models" / "hints" / "result.json").read_text())
        assert (hints["steps"], hints["scored"], hints["validation_accuracy"]) == (1, False, None)
        assert not (tmp_path / "small" / "predictions" / "hints.jsonl").exists()


def test_a_decoder_only_chain_and_what_doctor_and_show_say_of_it(
    cli: Any, tmp_path: Path, shop: str, save_tiny: Any
) -> None:
    save_tiny("llama", text=SHOP_WORDS, hidden_size=32, intermediate_size=64)
    llama = "{model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
    words = (
        shop,
        f"student={{config: {llama}, tokenizer: llama}}",
        "teachers={big: {kind: frozen, model: llama}}",
        SOFT,
        "scheme={kind: assistant_chain, teacher: big, derived: 1, guidance: ensemble}",
        "evaluate.controls=[]",
    )
    shown = cli("recipe", "show", *words).stdout
    assert "# stage 2 of 2, student: label + soft; taught by the mean of big, assistant_1" in shown
    examined = " ".join(cli("doctor", *words).stdout.split())
    assert "stage assistant_1 label + soft; taught by big" in examined
    assert "all stages 2 stages, one after the other" in examined
    cli("run", *words)
    card = load_scorecard(tmp_path / "runs" / "tiny")
    assert card.avalanche is not None
    assert [link.name for link in card.avalanche.links] == ["big", "assistant 1", "models above", "student"]
    recorded = (tmp_path / "runs" / "tiny" / "recipe.yaml").read_text()
    assert "hidden_size: 24" in recorded, "sqrt(32 x 16) = 22.6, a multiple of twice the 3 heads"


def test_two_processes_drop_the_same_teachers(cli: Any, chain: tuple[str, ...], tmp_path: Path) -> None:
    """Each process draws for itself; one that drew otherwise would have another gradient, or wait for ever."""
    from safetensors.torch import load_file

    words = (*chain, "scheme.drop=0.5", "student.config.dropout_rate=0.0", "train.rows_per_batch=8")
    cli("generate-rationales", *words, "run_dir=one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    cli("train", *words, "run_dir=one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "-m", "distill_llm", "train", *words, "run_dir=two"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for arm in ("middle", "student"):
        one, two = (
            load_file(tmp_path / run / "models" / arm / "model" / "model.safetensors") for run in ("one", "two")
        )
        assert one.keys() == two.keys()
        assert all((one[name] - two[name]).abs().max() < 2e-5 for name in one)
