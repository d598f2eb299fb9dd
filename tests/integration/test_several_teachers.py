"""Several teachers through the command line: two tiny models write, vote and give soft labels; one goes missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.test_cache import TEXT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "several-teachers.yaml"
SMALL = {
    "task": {"kind": "shop", "products": 20, "train_size": 48, "validation_size": 8, "test_size": 16},
    "train": {
        "optimizer": "adafactor",
        "learning_rate": 2.0e-2,
        "max_steps": 6,
        "rows_per_step": 16,
        "rows_per_batch": 16,
        "max_input_tokens": 32,
        "max_target_tokens": 32,
        "validate_every": 3,
    },
}


@pytest.fixture
def recipe(save_tiny: Any, tmp_path: Path) -> str:
    """The recipe of the repository with tiny teachers, a short training, and any rationale kept."""
    for name, seed in (("first", 5), ("second", 6)):
        shutil.move(tmp_path / save_tiny("t5", text=TEXT, seed=seed), tmp_path / name)
    content = yaml.safe_load(RECIPE.read_text()) | SMALL
    for name in ("first", "second"):
        content["rationales"]["teacher"]["of"][name]["teacher"]["model"] = f"./{name}"
        content["teachers"][name]["model"] = f"./{name}"
    content["rationales"] |= {"keep": [], "sampling": {"temperature": 1.0, "max_new_tokens": 8}}
    content["rationales"]["teacher"]["weigh_by"] = "fixed"  # untrained teachers state no label
    content |= {"label_from": "gold", "run_dir": "runs/student"}
    content["student"] |= {"tokenizer": "./first"}
    content["evaluate"] = {"resamples": 200, "max_new_tokens": 4, "controls": []}
    (tmp_path / "several.yaml").write_text(yaml.safe_dump(content))
    return "several.yaml"


def test_two_teachers_write_vote_and_give_soft_labels(cli: Any, recipe: str, tmp_path: Path, lines: Any) -> None:
    shown = cli("run", recipe, COLUMNS="200").stdout
    run = tmp_path / "runs" / "student"
    entries = lines(run / "rationales" / "journal.jsonl")
    assert [sum(entry["teacher"] == name for entry in entries) for name in ("first", "second")] == [64, 64]
    card = json.loads((run / "scorecard.json").read_text())
    assert [entry["name"] for entry in card["entries"]][:3] == ["teacher", "teacher first", "teacher second"]
    assert "teacher second" in shown
    assert json.loads((run / "lacking_teachers.json").read_text()) == {}


def test_one_that_is_gone_is_dropped_from_texts_and_soft_labels(cli: Any, recipe: str, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "second")
    doctor = cli("doctor", recipe, COLUMNS="300").stdout
    assert "it would be dropped" in doctor
    assert "'second' is left out of its ensemble" in doctor
    cli("run", recipe)
    card = json.loads((tmp_path / "runs" / "student" / "scorecard.json").read_text())
    assert sum("'second'" in note for note in card["notes"]) == 2
