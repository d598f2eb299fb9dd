"""Stage by stage, then all at once: every artefact is there and says the same thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_llm.evaluation.scorecard import load_scorecard
from distill_llm.rationales.dataset import read_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_stages_then_run(cli: Any, shop: str, tmp_path: Path, lines: Any) -> None:
    run = tmp_path / "runs" / "tiny"

    said = cli("generate-rationales", shop).stdout
    funnel = [line.split() for line in said.splitlines()]
    assert ["train", *["64"] * 6, "100.00%", "of", "64"] in funnel  # examples, asked, ... kept, votes right
    assert "Next: distill-llm train shop.yaml" in said
    rows = list(read_rows(run / "rationales" / "train.parquet"))
    assert [row.outcome for row in rows] == ["kept"] * 64
    assert len({entry["key"] for entry in lines(run / "rationales" / "journal.jsonl")}) == 64

    assert "Next: distill-llm evaluate runs/tiny" in cli("train", shop).stdout
    assert sorted(path.name for path in (run / "models").iterdir()) == ["student"]
    student = run / "models" / "student"
    assert sorted(path.name for path in student.iterdir()) == ["model", "plan.json", "result.json"]
    trained = json.loads((student / "result.json").read_text())
    assert (trained["steps"], trained["target"]) == (8, "label")
    weights = (student / "model" / "model.safetensors").read_bytes()

    said = cli("evaluate", "runs/tiny").stdout
    assert "cannot be judged" in said.replace("\n", " ")  # nothing to compare with yet
    alone = load_scorecard(run)
    assert [entry.name for entry in alone.entries] == ["student"]

    said = cli("run", shop).stdout
    assert "journal: 64 of 64 completions are there already" in said
    assert "student: " not in said.split("labels same steps")[0].split("rows:")[1]  # it is not trained again
    assert (student / "model" / "model.safetensors").read_bytes() == weights
    card = load_scorecard(run)
    assert {entry.name: entry.role for entry in card.entries} == {
        "student": "student",
        "labels same steps": "control",
        "labels same compute": "control",
    }
    assert [comparison.other for comparison in card.comparisons] == ["labels same compute", "labels same steps"]
    assert card.verdict in said.replace("\n", " ").replace("  ", " ") or card.verdict[:40] in said
    assert card.verdict in (run / "scorecard.md").read_text()

    from distill_llm.tasks.shop import Shop

    test = Shop.model_validate(yaml.safe_load((run / "recipe.yaml").read_text())["task"]).load(seed=17).test
    for entry in card.entries:
        predictions = lines(run / "predictions" / f"{entry.name.replace(' ', '_')}.jsonl")
        assert [one["example_id"] for one in predictions] == [example.id for example in test]
        right = [one["label"] == example.label for one, example in zip(predictions, test, strict=True)]
        assert [one["correct"] for one in predictions] == right
        assert entry.accuracy == sum(right) / 24
        assert entry.train_steps == (trained["steps"] if entry.name != "labels same compute" else entry.train_steps)
    assert not list(tmp_path.rglob("*.part"))
    assert not list(run.rglob("checkpoints"))


@pytest.mark.slow
def test_own_data_with_a_teacher_that_is_scored(cli: Any, tmp_path: Path, save_tiny: Any, lines: Any) -> None:
    """A transformers teacher with soft labels too, asked for train and test, on the questions that came along."""
    text = (ROOT / "data" / "sample" / "questions.jsonl").read_text(encoding="utf-8")
    teacher = save_tiny("t5", text=f"predict explain {text}")
    (tmp_path / "own.yaml").write_text(
        f"""\
name: own
task:
  kind: jsonl
  data: data/sample/questions.jsonl
  fields: {{id: id, input: question, label: label, choices: choices}}
rationales:
  teacher: {{kind: transformers, model: {teacher}}}
  sampling: {{max_new_tokens: 4}}
student: {{model: {teacher}}}
teachers: {{big: {{kind: frozen, model: {teacher}}}}}
objective:
  - {{name: label, loss: {{kind: cross_entropy}}, targets: [label]}}
  - {{name: soft, loss: {{kind: forward_kl}}, targets: [label], teacher: big}}
train: {{max_steps: 3, rows_per_step: 8, rows_per_batch: 8, max_target_tokens: 8}}
evaluate: {{resamples: 200, controls: [labels_same_compute]}}
"""
    )
    cli("run", "own.yaml")
    run = tmp_path / "runs" / "own"
    asked = lines(run / "rationales" / "journal.jsonl")
    assert sorted({entry["split"] for entry in asked}) == ["test", "train"]
    assert len(list(read_rows(run / "rationales" / "test.parquet"))) == 6
    card = load_scorecard(run)
    assert [entry.role for entry in card.entries] == ["teacher", "student", "control"]
    control = next(entry for entry in card.entries if entry.role == "control")
    assert control.train_steps == 4  # (6 + 2) / 6 of 3 steps: the teacher is as large as the student
