"""A run folder belongs to one recipe: what is refused, what may change, and what is asked again after a change."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_llm.core.errors import ConfigError, StorageError
from distill_llm.core.files import Journal
from distill_llm.pipeline.rationale_stage import check, read_material
from distill_llm.pipeline.run import generate_rationales
from distill_llm.pipeline.run_folder import RunFolder, claim, open_run
from distill_llm.rationales.dataset import read_rows
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.base import Completion, Request
from distill_llm.teachers.gold import Gold

YAML = """
name: tiny
task: {kind: shop, products: 20, train_size: 12, validation_size: 4, test_size: 4}
rationales: {teacher: {kind: gold}}
student:
  config: {model_type: t5, d_model: 16}
  tokenizer: {kind: words}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}
train: {max_steps: 3}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """Builds the recipe, with overrides, for the folder ``run`` of this test."""

    def build(*overrides: str) -> Recipe:
        return recipe_from(parse_yaml(YAML, "tiny"), [f"run_dir={tmp_path / 'run'}", *overrides])

    return build


def _begin_training(run: RunFolder) -> None:
    run.arm("student").mkdir(parents=True)


def test_claim_writes_the_whole_recipe(recipe: Any) -> None:
    run = claim(recipe())
    assert yaml.safe_load(run.recipe.read_text()) == recipe().model_dump(mode="json")
    assert [path.name for path in run.root.iterdir()] == ["recipe.yaml"]


def test_claim_takes_an_empty_folder(recipe: Any) -> None:
    recipe().folder.mkdir()
    assert claim(recipe()).recipe.is_file()


def test_claim_refuses_a_folder_with_something_else(recipe: Any) -> None:
    folder = recipe().folder
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"is not empty, and is not a run folder. Choose another: run_dir="):
        claim(recipe())
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_claim_refuses_a_file(recipe: Any) -> None:
    recipe().folder.write_text("no folder")
    with pytest.raises(StorageError, match="A file lies where a folder is needed: choose another run_dir"):
        claim(recipe())
    assert recipe().folder.read_text() == "no folder"


def test_claim_refuses_another_recipe_and_names_what_differs(recipe: Any) -> None:
    run = claim(recipe())
    _begin_training(run)
    before = run.recipe.read_text()
    with pytest.raises(ConfigError) as caught:
        claim(recipe("train.max_steps=4", "objective.rationale.weight=2", "seed=17"))
    lines = str(caught.value).split("\n")
    assert lines[0] == f"run_dir: {run.root} was filled by another recipe:"
    assert lines[1:-1] == ["  objective.1.weight: 1.0 there, 2.0 here", "  train.max_steps: 3 there, 4 here"]
    assert "run_dir=runs/another" in lines[-1]
    assert run.recipe.read_text() == before


def test_claim_shows_eight_differences_and_counts_the_rest(recipe: Any) -> None:
    run = claim(recipe())
    _begin_training(run)
    sizes = [f"task.{key}=9" for key in ("products", "train_size", "validation_size", "test_size", "task_seed")]
    train = [f"train.{key}=1" for key in ("max_steps", "warmup_steps", "weight_decay", "patience")]
    with pytest.raises(ConfigError) as caught:
        claim(recipe(*sizes, *train, "seed=1"))
    assert len(str(caught.value).split("\n")) == 1 + 8 + 2
    assert "and 2 more" in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "evaluate.batch_rows=3",
        "evaluate.ablations={only_label: [label]}",
        "evaluate.controls=[]",
        "train.workers=2",
        "train.report_to=[wandb]",
        "train.keep_checkpoints=3",
    ],
)
def test_what_no_training_depends_on_may_change(override: str, recipe: Any) -> None:
    _begin_training(claim(recipe()))
    run = claim(recipe(override))
    assert yaml.safe_load(run.recipe.read_text()) == recipe(override).model_dump(mode="json")


def test_a_moved_folder_is_the_same_run(recipe: Any, tmp_path: Path) -> None:
    _begin_training(claim(recipe()))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert claim(recipe(f"run_dir={tmp_path / 'moved'}")).root == tmp_path / "moved"


@pytest.mark.parametrize(
    "override",
    ["train.max_steps=9", "student.config.d_model=8", "seed=3", "rationales.keep=[{kind: agrees_with_vote}]"],
)
def test_before_training_settings_may_change(override: str, recipe: Any) -> None:
    claim(recipe())
    assert claim(recipe(override)).recipe.is_file()


@pytest.mark.parametrize(("override", "key"), [("name=other", "name"), ("task.train_size=13", "task.train_size")])
def test_before_training_name_and_task_may_not(override: str, key: str, recipe: Any) -> None:
    claim(recipe())
    with pytest.raises(ConfigError, match=f"was filled by another recipe:\n  {key}: "):
        claim(recipe(override))


class _Counted:
    """Answers every other request wrongly, and counts what it is asked."""

    identity = "counted"

    def __init__(self) -> None:
        self.asked = 0

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Completion]]:
        for request in requests:
            self.asked += 1
            wrong = next(choice for choice in request.example.choices if choice != request.example.label)
            label = wrong if int(request.example.id.rsplit("-", 1)[1]) % 2 else request.example.label
            yield request, Completion(f"{request.example.rationale} so {label}", 3, 4)


def test_another_keep_rule_asks_the_teacher_nothing(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = _Counted()
    monkeypatch.setattr(Gold, "open", lambda self, **_: teacher)
    run = generate_rationales(recipe())
    journal = run.journal.read_bytes()
    assert teacher.asked == 12
    assert {row.outcome for row in read_rows(run.rationales("train"))} == {"kept"}

    generate_rationales(recipe("rationales.keep=[{kind: agrees_with_label}]"))
    assert teacher.asked == 12
    assert run.journal.read_bytes() == journal
    outcomes = [row.outcome for row in read_rows(run.rationales("train"))]
    assert outcomes == ["kept", "rule: agrees_with_label"] * 6


@pytest.mark.parametrize(
    "override", ["rationales.keep=[{kind: agrees_with_label}]", "rationales.sampling.temperature=0.5", "seed=5"]
)
def test_training_refuses_rationales_of_other_settings(recipe: Any, override: str) -> None:
    run = generate_rationales(recipe())
    splits = check(recipe())
    assert read_material(recipe(), splits, run) is not None
    with pytest.raises(ConfigError, match="made with another task, seed or `rationales` section"):
        read_material(recipe(override), splits, run)


def test_another_sampling_setting_asks_all_anew(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = _Counted()
    monkeypatch.setattr(Gold, "open", lambda self, **_: teacher)
    generate_rationales(recipe())
    run = generate_rationales(recipe("rationales.sampling.temperature=0.5"))
    assert teacher.asked == 24
    assert len(Journal(run.journal).entries) == 24


def test_torn_journal_asks_for_the_torn_completion_alone(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = _Counted()
    monkeypatch.setattr(Gold, "open", lambda self, **_: teacher)
    run = generate_rationales(recipe())
    whole, rows = run.journal.read_bytes(), read_rows(run.rationales("train"))
    run.journal.write_bytes(whole[:-9])
    generate_rationales(recipe())
    assert teacher.asked == 13
    assert run.journal.read_bytes() == whole
    assert read_rows(run.rationales("train")) == rows


def test_spent_seconds_add_up(recipe: Any) -> None:
    run = claim(recipe())
    assert run.completions_per_second("train") is None
    run.note_seconds("train", 30, 2.0)
    run.note_seconds("train", 10, 3.0)
    run.note_seconds("test", 5, 1.0)
    assert run.completions_per_second("train") == 40 / 5
    assert run.completions_per_second("test") == 5


def test_open_run_reads_the_recipe_back(recipe: Any) -> None:
    run, found = open_run(claim(recipe()).root, ["evaluate.batch_rows=3"])
    assert found == recipe("evaluate.batch_rows=3")
    assert run.root == recipe().folder


def test_open_run_takes_no_other_override(recipe: Any) -> None:
    root = claim(recipe()).root
    with pytest.raises(ConfigError, match="'seed=3': a finished run only takes overrides of evaluate"):
        open_run(root, ["seed=3"])


def test_open_run_refuses_what_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a run folder: there is no recipe\.yaml in it"):
        open_run(tmp_path)


def test_nothing_half_written_is_left_behind(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(StorageError, match="The disk is full: free some space"):
        claim(recipe())
    assert list(recipe().folder.iterdir()) == []
