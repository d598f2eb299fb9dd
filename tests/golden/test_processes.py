"""One process and two processes (torchrun, gloo, CPU) train the same student, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from distill_llm.models.load import LoadedModel

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "data" / "sample" / "questions.jsonl"
SIZES: dict[str, dict[str, Any]] = {
    "t5": {"model_type": "t5", "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4},
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    },
}


def _recipe(family: str, folder: Path, teacher: Path) -> dict[str, Any]:
    dropout = {"dropout_rate": 0.0} if family == "t5" else {}
    return {
        "name": f"two-processes-{family}",
        "run_dir": str(folder),
        "task": {
            "kind": "jsonl",
            "data": str(SAMPLE),
            "fields": {"input": ["question"], "label": "label", "rationale": "rationale", "choices": "choices"},
        },
        "rationales": {"teacher": {"kind": "gold"}},
        "student": {"config": SIZES[family] | dropout, "tokenizer": str(teacher)},
        "teachers": {"big": {"kind": "frozen", "model": str(teacher)}},
        "objective": [
            {"name": "label", "loss": {"kind": "cross_entropy"}, "targets": ["label"]},
            {"name": "rationale", "loss": {"kind": "cross_entropy"}, "targets": ["rationale"], "weight": 0.5},
            {
                "name": "soft",
                "loss": {"kind": "forward_kl", "temperature": 2.0},
                "targets": ["label"],
                "teacher": "big",
            },
        ],
        "train": {
            "learning_rate": 1e-2,
            "optimizer": "adafactor",
            "max_steps": 6,
            "rows_per_step": 8,
            "rows_per_batch": 2,
            "validate_every": 3,
            "max_input_tokens": 256,
            "max_target_tokens": 96,
        },
        "evaluate": {"max_new_tokens": 4, "controls": []},
    }


def _distill_llm(arguments: Sequence[str], *, logs: Path, processes: int = 1) -> None:
    """Runs the real command; torchrun keeps one folder of ``logs`` for each process that it starts."""
    start = [sys.executable, "-m", "distill_llm"]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch = ["--nproc_per_node", str(processes), "--master_addr", "127.0.0.1", "--master_port", str(port)]
        launch += ["--log-dir", str(logs), "--tee", "3"]
        start = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "distill_llm"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*start, *arguments], capture_output=True, text=True, timeout=240, env=environment, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_two_processes_train_what_one_process_trains(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Same weights, same rows, same validation accuracy. ``accelerate launch --cpu`` would start one process silently;
    here each process leaves a log, and one that trained alone would see half of each step's rows."""
    build: Callable[..., LoadedModel] = request.getfixturevalue(f"tiny_{family}")
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    teacher = build(seed=8, tokenizer="bytes_bpe", text=" ".join(row["rationale"] for row in rows))
    teacher.model.save_pretrained(tmp_path / "teacher")
    teacher.tokenizer.save_pretrained(tmp_path / "teacher")
    weights, results = [], []
    first = tmp_path / "run-1"
    for processes in (1, 2):
        folder = tmp_path / f"run-{processes}"
        recipe = tmp_path / f"recipe-{processes}.yaml"
        recipe.write_text(yaml.safe_dump(_recipe(family, folder, tmp_path / "teacher")))
        if processes == 1:
            _distill_llm(["generate-rationales", str(recipe)], logs=tmp_path)
            shutil.copytree(first, tmp_path / "run-2")
        _distill_llm(["train", str(recipe)], processes=processes, logs=tmp_path / "logs")
        weights.append(load_file(folder / "models" / "student" / "model" / "model.safetensors"))
        results.append(json.loads((folder / "models" / "student" / "result.json").read_text()))
    assert {path.parent.name for path in (tmp_path / "logs").rglob("stderr.log")} == {"0", "1"}
    one, two = weights
    assert one.keys() == two.keys()
    for name in one:
        gap = (one[name] - two[name]).abs().max().item()
        assert gap < 2e-5, f"{name}: {gap} apart"
    for field in ("steps", "best_step", "tokens", "validation_accuracy"):
        assert results[0][field] == results[1][field], field


WAITING = """
import time
from pathlib import Path
from distill_llm.core.processes import main_first, summed
made = Path("made")
main_first(lambda: (time.sleep(2), made.touch()) and None)
assert made.exists(), "this process did not wait"
assert summed(1, 20) == (2, 40)
"""


@pytest.mark.slow
def test_the_others_wait_for_the_main_process(tmp_path: Path) -> None:
    """On a CPU too, where accelerate makes no group of processes unless it is told of the CPU."""
    (tmp_path / "waiting.py").write_text(WAITING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "waiting.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        launch, capture_output=True, text=True, timeout=120, env=environment, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
