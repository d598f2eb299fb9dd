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
import torch
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

WRITES = {
    "scheme": {"kind": "on_policy", "student_fraction": 0.5, "draw": "row", "temperature": 0.0, "max_new_tokens": 6}
}
"""The student writes half of the labels."""


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
            {
                "name": "hint",
                "loss": {"kind": "hint"},
                "targets": ["label", "rationale"],
                "teacher": "big",
                "until": 0.5,  # its heads get no gradient after that, and DDP waits for all
            },
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
@pytest.mark.parametrize(
    ("family", "scheme"),
    [("t5", {}), ("llama", {}), ("t5", WRITES), ("llama", WRITES)],
    ids=["t5", "llama", "t5-on_policy", "llama-on_policy"],
)
def test_two_processes_train_what_one_process_trains(
    family: str, scheme: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Same weights, same rows, same validation accuracy. ``accelerate launch --cpu`` would start one process silently;
    here each process leaves a log, and one that trained alone would see half of each step's rows."""
    build: Callable[..., LoadedModel] = request.getfixturevalue(f"tiny_{family}")
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    wider = {"d_model": 24} if family == "t5" else {"hidden_size": 24}
    teacher = build(seed=8, tokenizer="bytes_bpe", text=" ".join(row["rationale"] for row in rows), **wider)
    teacher.model.save_pretrained(tmp_path / "teacher")
    teacher.tokenizer.save_pretrained(tmp_path / "teacher")
    weights, results = [], []
    first = tmp_path / "run-1"
    for processes in (1, 2):
        folder = tmp_path / f"run-{processes}"
        recipe = tmp_path / f"recipe-{processes}.yaml"
        recipe.write_text(yaml.safe_dump(_recipe(family, folder, tmp_path / "teacher") | scheme))
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
def test_the_others_wait_for_the_main_process(launch: Callable[..., Any], tmp_path: Path) -> None:
    """On a CPU too, where accelerate makes no group of processes unless it is told of the CPU."""
    (tmp_path / "waiting.py").write_text(WAITING)
    launch("waiting.py", timeout=120, CUDA_VISIBLE_DEVICES="")


TRAINING = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, TrainerCallback
from distill_llm.core.processes import is_main_process
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.models.load import LoadedModel
from distill_llm.objective import Objective, Term
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.frozen import FrozenTeacher
from distill_llm.training.train import make_trainer

rows = []
for example in range(8):
    asked = [*range(5 + example, 8 + example + example % 4)]  # of words of one kind attention would learn nothing
    rows.append(Row(example, "label", asked, [6 + example, 1]))
    rows.append(Row(example, "rationale", asked, [*range(8, 12 + 3 * example), 1]))
terms = [Term(name="rationale", loss=CrossEntropy(), targets=("rationale",), weight=0.5)]
terms += [Term(name="soft", loss=ForwardKL(), targets=("label",), teacher="big")]
teacher = AutoModelForSeq2SeqLM.from_pretrained("teacher")


class Keep(TrainerCallback):
    def on_log(self, *ignored, logs, **others):
        kept.append(logs)


for tokens, packing in ((0, "auto"), (50, "auto"), (0, "never")):
    model = AutoModelForSeq2SeqLM.from_pretrained("student")
    student = LoadedModel(model, AutoTokenizer.from_pretrained("student"))
    spec = TrainSpec(max_steps=3, rows_per_step=8, rows_per_batch=2, tokens_per_batch=tokens, validate_every=1,
                     learning_rate=1e-2, optimizer="adafactor", packing=packing)
    folder, kept = Path(sys.argv[1]) / f"{tokens}-{packing}", []
    trainer = make_trainer(student, rows, spec=spec, max_steps=3, scheme=StepByStep(), objective=Objective(terms),
                           teachers={"big": FrozenTeacher(teacher)}, validate=None, folder=folder, seed=3)
    trainer.add_callback(Keep())
    trainer.train()
    if is_main_process():
        logs = [entry for entry in kept if "loss" in entry]
        torch.save({"logs": logs, "cuts": trainer.args.gradient_accumulation_steps,
                    "weights": student.model.state_dict()}, folder / "after.pt")
"""


@pytest.mark.slow
def test_neither_processes_nor_cuts_change_the_update_or_the_logs(
    tiny_t5: Callable[..., LoadedModel], launch: Callable[..., Any], tmp_path: Path
) -> None:
    """Cut by rows and by padded tokens, each input read once and padded to the longest, in one process and in two: six
    trainings, one result."""
    for name, seed in (("student", 1), ("teacher", 2)):
        model = tiny_t5(seed=seed)
        model.model.save_pretrained(tmp_path / name)
        model.tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "training.py").write_text(TRAINING)
    results = []
    for folder, processes in (("one", 0), ("two", 2)):
        launch("training.py", folder, processes=processes, CUDA_VISIBLE_DEVICES="")
        results += [torch.load(tmp_path / folder / cut / "after.pt") for cut in ("0-auto", "50-auto", "0-never")]
    assert [result["cuts"] for result in results] == [4, 3, 4, 2, 2, 2]
    first = results[0]
    assert {"agreement_soft", "teacher_entropy_soft", "gradient_share_soft", "tokens_soft"} <= set(first["logs"][0])
    for other in results[1:]:
        for name, weight in first["weights"].items():
            torch.testing.assert_close(other["weights"][name], weight, atol=2e-5, rtol=0)
        assert len(other["logs"]) == 3
        for mine, theirs in zip(first["logs"], other["logs"], strict=True):
            assert mine.keys() == theirs.keys()
            for name in mine:
                assert theirs[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-6), name
