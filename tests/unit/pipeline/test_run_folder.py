"""A run folder belongs to one recipe: what is refused, what may change, and which files are whose."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_llm.core.errors import ConfigError, StorageError
from distill_llm.core.files import write_json
from distill_llm.pipeline.run_folder import RunFolder, claim, open_run, settled, what_differs
from distill_llm.rationales.ledger import Prices, Spent, ledger_report
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe

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


def test_claim_takes_a_folder_that_a_sweep_has_begun(recipe: Any) -> None:
    folder = recipe().folder
    for name in ("sweep", "rationales"):
        (folder / name).mkdir(parents=True)
    assert claim(recipe()).recipe.is_file()


def test_settled_is_what_a_finished_student_depends_on(recipe: Any) -> None:
    """As ``claim`` sees it, and what validation is asked, too."""
    plain = settled(recipe())
    for word in (
        "run_dir=elsewhere",
        "name=other",
        "train.workers=4",
        "evaluate.controls=[]",
        "evaluate.resamples=200",
    ):
        assert settled(recipe(word)) == plain, word
    for word in ("seed=3", "train.seed=3", "train.max_steps=4", "evaluate.max_new_tokens=3", "task.train_size=13"):
        assert settled(recipe(word)) != plain, word


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
        claim(recipe("task.products=21", "student.prefixes.label='ask: '", "seed=17", "train.max_steps=4"))
    lines = str(caught.value).split("\n")
    assert lines[0] == f"run_dir: {run.root} was filled by another recipe:"
    said = ["  student.prefixes.label: 'predict: ' there, 'ask: ' here", "  task.products: 20 there, 21 here"]
    assert lines[1:-1] == said, "what single trainings depend on is told by their plans"
    assert "run_dir=runs/another" in lines[-1]
    assert run.recipe.read_text() == before


def test_claim_shows_eight_differences_and_counts_the_rest(recipe: Any) -> None:
    run = claim(recipe())
    _begin_training(run)
    sizes = [f"task.{key}=9" for key in ("products", "train_size", "validation_size", "test_size", "task_seed")]
    words = [f"student.prefixes.{key}='{key}? '" for key in ("label", "rationale", "rationale_then_label")]
    with pytest.raises(ConfigError) as caught:
        claim(recipe(*sizes, *words, "student.tokenizer.vocab_size=99", "seed=1"))
    assert len(str(caught.value).split("\n")) == 1 + 8 + 2
    assert "and 2 more" in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "evaluate.batch_rows=3",
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
    ["train.max_steps=9", "student.config.d_model=8", "seed=3", "rationales.keep=[{kind: majority}]"],
)
def test_before_training_settings_may_change(override: str, recipe: Any) -> None:
    claim(recipe())
    assert claim(recipe(override)).recipe.is_file()


@pytest.mark.parametrize(("override", "key"), [("name=other", "name"), ("task.train_size=13", "task.train_size")])
def test_before_training_name_and_task_may_not(override: str, key: str, recipe: Any) -> None:
    claim(recipe())
    with pytest.raises(ConfigError, match=f"was filled by another recipe:\n  {key}: "):
        claim(recipe(override))


def test_what_only_says_how_the_teacher_is_asked_may_change(recipe: Any) -> None:
    """After training too: what it wrote does not depend on it."""
    teacher = "rationales.teacher={kind: openai_compatible, model: m}"
    _begin_training(claim(recipe(teacher)))
    manner = sorted(recipe(teacher).rationales.teacher.manner)
    assert manner
    changes = ["budget.max_requests=9", "prices.input_per_million=2", "allow_missing=0.5"]
    assert claim(recipe(teacher, *(f"rationales.{change}" for change in changes))).recipe.is_file()
    number = next(name for name in manner if type(getattr(recipe(teacher).rationales.teacher, name)) is int)
    assert claim(recipe(teacher, f"rationales.teacher.{number}=3")).recipe.is_file()
    with pytest.raises(ConfigError, match=r"rationales\.teacher\.model: 'm' there, 'n' here"):
        claim(recipe(teacher, "rationales.teacher.model=n"))


def test_each_process_has_a_journal_and_a_ledger_of_its_own(recipe: Any) -> None:
    run = RunFolder(recipe().folder)
    assert (run.journals(), run.ledgers()) == ([], [])
    run.rationale_folder.mkdir(parents=True)
    for process in (0, 1, 12):
        run.journal(process).write_text("")
        run.ledger(process).write_text("{}")
    assert [path.name for path in run.journals()] == ["journal.1.jsonl", "journal.12.jsonl", "journal.jsonl"]
    assert [path.name for path in run.ledgers()] == ["ledger.1.json", "ledger.12.json", "ledger.json"]


def test_speed_is_that_of_what_was_spent(recipe: Any) -> None:
    run = claim(recipe())
    assert run.completions_per_second("train") is None
    spent = {"train": Spent(requests=50, completions=40, seconds=5.0), "test": Spent(completions=5)}
    write_json(run.spent, ledger_report(spent, Prices()))
    assert run.completions_per_second("train") == 40 / 5
    assert run.completions_per_second("test") is None, "it was there already"
    assert run.completions_per_second("validation") is None


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


def test_where_a_cache_lies_and_where_a_teacher_runs_may_change_after_training_began(recipe: Any) -> None:
    teachers = "teachers={a: {kind: frozen, model: a/b}, c: {kind: cached, of: a}}"
    _begin_training(claim(recipe(teachers)))
    manner = recipe(teachers, "teachers.c.folder=/elsewhere", "teachers.c.shard_megabytes=8", "teachers.a.device=cpu")
    run = claim(manner)
    assert what_differs(manner, run) == []
    assert what_differs(recipe(teachers, "teachers.a.model=a/c"), run) == [
        "  teachers.a.model: 'a/b' there, 'a/c' here"
    ]
