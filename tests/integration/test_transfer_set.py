"""A transfer set without a class, through the command line, with a tiny teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "transfer-set.yaml"
TEXT = "and : how dear ? cheap low fair high dear"


def test_the_recipe_runs_and_is_scored_again_without_the_offset(cli: Any, save_tiny: Any, tmp_path: Path) -> None:
    save_tiny("t5", text=TEXT, seed=5)
    content = yaml.safe_load(RECIPE.read_text())
    content["task"] |= {"products": 20, "highest_price": 10, "train_size": 96, "validation_size": 24, "test_size": 40}
    content["run_dir"] = "runs/student"
    content["student"]["tokenizer"] = content["teachers"]["big"]["model"] = "./t5"
    content["train"] |= {"max_steps": 4, "rows_per_step": 16, "rows_per_batch": 16, "validate_every": 2}
    content["evaluate"]["resamples"] = 200
    (tmp_path / "transfer.yaml").write_text(yaml.safe_dump(content))
    shown = cli("run", "transfer.yaml", COLUMNS="200").stdout
    assert "fair (left out)" in shown
    cli("evaluate", "runs/student", "evaluate.label_bias={}")
    card = json.loads((tmp_path / "runs" / "student" / "scorecard.json").read_text())
    assert [entry["name"] for entry in card["entries"]] == ["student", "labels same steps"]
    assert [one["label"] for one in card["classes"] if one["left_out"]] == ["fair"]
