"""A sweep from the command line: dry run, kill, resume, workers; its table, and what test was looked at for."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
GRID = ("train.learning_rate=[1e-2, 2e-2, 4e-2]",)
MORE = ("evaluate.controls=[labels_same_steps]", "train.max_steps=12", "train.validate_every=6")


def _trained(sweep: Path) -> dict[str, float]:
    """When each run's student was finished."""
    return {path.parts[-4]: path.stat().st_mtime for path in sweep.glob("runs/*/models/student/result.json")}


def test_killed_sweep_goes_on_and_ends_as_one_that_was_not(cli: Any, start: Any, shop: str, tmp_path: Path) -> None:
    words = ("sweep", shop, *GRID, *MORE)
    said = cli(*words, "--dry-run").stdout
    assert "3 settings = 3 runs, 0 of them trained already" in said.replace("\n", " ")
    assert not (tmp_path / "runs").exists()

    sweep = tmp_path / "runs" / "tiny" / "sweep"
    process = start(*words)
    end = time.monotonic() + 120
    while not _trained(sweep):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = _trained(sweep)
    assert 1 <= len(before) < 3
    assert not list(sweep.glob("by-*"))

    said = cli(*words, "train.workers=2").stdout
    assert f"sweep: {len(before)} of 3 runs are there already" in said
    after = _trained(sweep)
    assert len(after) == 3
    assert {name: after[name] for name in before} == before, "finished runs are not trained again"

    report = json.loads((sweep / "by-learning_rate" / "sweep.json").read_text())
    results = {
        folder.name: json.loads((folder / "models" / "student" / "result.json").read_text())["validation_accuracy"]
        for folder in sweep.glob("runs/*")
    }
    assert {Path(one["folders"][0]).name: one["mean"] for one in report["tried"]} == results
    best = report["tried"][report["chosen"]]
    assert best["mean"] == max(results.values())
    assert [path.parent.name for path in sweep.glob("runs/*/scorecard.json")] == [Path(best["folders"][0]).name]
    assert len(list(sweep.glob("runs/*/predictions"))) == 1, "test was predicted for the chosen one alone"
    card = json.loads((tmp_path / best["folders"][0] / "scorecard.json").read_text())
    assert [one["mean"] for one in report["test"]] == [entry["accuracy"] for entry in card["entries"]]
    assert report["advice"].startswith(f"Take {' '.join(best['overrides'])}: ")
    assert best["overrides"][0] in said.replace("\n", " ")
    journal = (tmp_path / "runs" / "tiny" / "rationales" / "journal.jsonl").read_text().splitlines()
    assert len(journal) == 64, "no rationale was asked for twice"
    assert not list(tmp_path.rglob("*.part"))


def test_nothing_is_written_where_a_word_is_wrong(cli: Any, shop: str, tmp_path: Path) -> None:
    said = cli("sweep", shop, "train.learning_rat=[1e-2, 2e-2]", expect=2).stderr
    assert "shop.yaml with train.learning_rat=0.01 is not a valid recipe" in said
    assert "Did you mean 'learning_rate'?" in said
    assert "nothing varies" in cli("sweep", shop, expect=2).stderr
    assert not (tmp_path / "runs").exists()
