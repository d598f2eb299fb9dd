"""Killed or interrupted at any time, a run goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill_llm.rationales.dataset import read_rows

pytestmark = pytest.mark.slow
LONG = ("train.max_steps=160", "train.validate_every=10", "evaluate.controls=[]")


def _wait(process: subprocess.Popen[str], there: Callable[[], bool], seconds: float = 120) -> None:
    """Until something is there, while the process is still at it."""
    end = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, f"finished too early\n{process.communicate()}"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _stop(process: subprocess.Popen[str], number: int) -> tuple[int, str]:
    """The exit code and what was said on standard error; the signal goes to the group, as from a terminal."""
    assert process.poll() is None, "finished before it could be stopped"
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def _checkpoints(run: Path, arm: str = "student") -> list[int]:
    found = (run / "models" / arm).glob("rate-*/checkpoints/checkpoint-*/trainer_state.json")
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in found)


def test_training_that_is_killed_and_interrupted_ends_the_same(cli: Any, start: Any, shop: str, tmp_path: Path) -> None:
    cli("run", shop, *LONG, "run_dir=whole")
    run, words = tmp_path / "torn", ("run", shop, *LONG, "run_dir=torn")

    process = start(*words)
    _wait(process, lambda: bool(_checkpoints(run)))
    code, _ = _stop(process, signal.SIGKILL)
    assert code == -signal.SIGKILL
    before = _checkpoints(run)[-1]
    assert before < 160
    assert not (run / "models" / "student" / "result.json").exists()

    process = start(*words)
    _wait(process, lambda: _checkpoints(run)[-1:] > [before])
    code, errors = _stop(process, signal.SIGINT)
    assert code == 130, errors
    reached = _checkpoints(run)[-1]
    assert f"error: stopped at step {reached} of 160; a checkpoint is saved." in errors
    assert f"To go on: distill-llm run shop.yaml {' '.join(LONG[:2])} 'evaluate.controls=[]' run_dir=torn" in errors
    assert "Traceback" not in errors
    assert before < reached < 160

    cli(*words)
    for name in ("models/student/model/model.safetensors", "predictions/student.jsonl", "rationales/train.parquet"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list(tmp_path.rglob("*.part"))


def test_workers_that_are_interrupted_save_and_go_on(cli: Any, start: Any, shop: str, tmp_path: Path) -> None:
    words = ("run", shop, *LONG[:2], "evaluate.controls=[labels_same_steps]")
    cli(*words, "run_dir=whole")
    run, arms = tmp_path / "torn", ("student", "labels_same_steps")
    process = start(*words, "run_dir=torn", "train.workers=2")
    _wait(process, lambda: all(_checkpoints(run, arm) for arm in arms))
    code, errors = _stop(process, signal.SIGINT)
    assert code == 130, errors
    assert "each training that was under way has saved a checkpoint" in errors
    assert "Traceback" not in errors
    cli(*words, "run_dir=torn")
    for arm in arms:
        name = f"models/{arm}/model/model.safetensors"
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_generation_that_is_killed_asks_only_for_the_rest(
    cli: Any, start: Any, shop: str, tmp_path: Path, save_tiny: Any, lines: Any
) -> None:
    teacher = save_tiny("t5", text="ann bob buys and . who pays more ? so 1 2 3 + = > <")
    more = (
        f"rationales.teacher={{kind: transformers, model: {teacher}, batch_rows: 4}}",
        "rationales.sampling.max_new_tokens=24",
        "task.train_size=600",
        "task.products=100",
    )
    cli("generate-rationales", shop, *more, "run_dir=whole")
    whole = lines(tmp_path / "whole" / "rationales" / "journal.jsonl")

    words = ("generate-rationales", shop, *more, "run_dir=torn")
    journal = tmp_path / "torn" / "rationales" / "journal.jsonl"
    process = start(*words)
    _wait(process, lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 20)
    assert _stop(process, signal.SIGKILL)[0] == -signal.SIGKILL
    kept = journal.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    written = kept.count(b"\n")
    assert 20 <= written < len(whole)
    assert not (tmp_path / "torn" / "rationales" / "train.parquet").exists()

    said = cli(*words).stdout
    assert f"rationales, train: {written} of 600" in said
    assert journal.read_bytes().startswith(kept)
    keys = [entry["key"] for entry in lines(journal)]
    assert len(keys) == len(set(keys)) == len(whole)
    assert {entry["key"]: entry["text"] for entry in lines(journal)} == {e["key"]: e["text"] for e in whole}
    rows = [list(read_rows(tmp_path / run / "rationales" / "train.parquet")) for run in ("torn", "whole")]
    assert rows[0] == rows[1]

    cli(*words)
    assert len(lines(journal)) == len(whole)  # a finished stage asks nothing
