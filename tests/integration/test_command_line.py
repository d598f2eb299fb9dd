"""What the command line says without any work: at once, and without the packages that take seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import distill_llm
from distill_llm.core.component import kinds
from distill_llm.tasks.base import Task

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml"))
HEAVY = {"torch", "transformers", "datasets", "pyarrow", "peft", "evaluate", "accelerate", "numpy", "pandas"}
LISTS_MODULES = """
import atexit, sys
atexit.register(lambda: print("MODULES", *{name.split(".")[0] for name in sys.modules}, file=sys.stderr))
from distill_llm.cli.main import main
main()
"""


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["run", "--help"],
        ["--version"],
        ["tasks"],
        ["recipe", "list"],
        ["recipe", "schema"],
        ["recipe", "check", NAMES[0]],
        ["recipe", "show", NAMES[0]],
        ["sweep", NAMES[0], "train.max_input_tokens=[8, 9]", "--dry-run"],
        ["run", "no-such.yaml"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTS_MODULES, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    said = done.stderr.rpartition("MODULES")
    assert said[1], done.stderr
    loaded = set(said[2].split())
    assert {"distill_llm", "typer"} <= loaded  # the list is that of a process that did its work
    assert loaded & HEAVY == set()
    assert done.returncode == (2 if words[-1] == "no-such.yaml" else 0), done.stderr


def test_version(cli: Any) -> None:
    assert cli("--version").stdout == f"distill-llm {distill_llm.__version__}\n"


def test_module_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distill_llm", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"distill-llm {distill_llm.__version__}\n"


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_names_every_command(word: str, cli: Any) -> None:
    said = cli(word).stdout
    for command in ("quickstart", "generate-rationales", "train", "evaluate", "run", "sweep", "tasks", "recipe"):
        assert f" {command} " in said


def test_tasks_lists_every_kind_with_its_licence(cli: Any) -> None:
    said = cli("tasks", COLUMNS="200").stdout
    for kind, task in kinds(Task, "distill_llm.tasks").items():
        (line,) = [line for line in said.splitlines() if line.startswith(f"{kind} ")]
        assert task.title in line
        assert task.licence in line


def test_recipe_list_names_every_recipe_with_its_first_line(cli: Any) -> None:
    said = cli("recipe", "list").stdout.splitlines()
    assert [line.split()[0] for line in said] == NAMES
    for line in said:
        name, first = line.split("  ", 1)
        assert (ROOT / name).read_text(encoding="utf-8").startswith(f"# {first}\n")


def test_recipe_schema_accepts_what_recipe_show_shows(cli: Any) -> None:
    schema = json.loads(cli("recipe", "schema").stdout)
    shown = yaml.safe_load(cli("recipe", "show", NAMES[0], "seed=3").stdout)
    jsonschema.Draft202012Validator(schema).validate(shown)
    assert shown["seed"] == 3
    assert shown["train"]["max_grad_norm"] == 1.0  # a default, filled in


def test_recipe_check_says_where_the_run_would_be(cli: Any, shop: str, tmp_path: Path) -> None:
    assert cli("recipe", "check", shop).stdout == "shop.yaml: valid; it fills runs/tiny\n"
    assert "train.max_step: there is no such key" in cli("recipe", "check", shop, "train.max_step=3", expect=2).stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [["run"], ["rum"], ["train", "a.yaml", "--arms", "x"]], ids=" ".join)
def test_wrong_use(words: list[str], cli: Any) -> None:
    done = cli(*words, expect=2)
    assert done.stdout == ""
    assert "Usage: distill-llm" in done.stderr


def test_no_word_at_all_is_a_call_for_help(cli: Any) -> None:
    import subprocess as sub

    done = sub.run([sys.executable, "-m", "distill_llm"], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2)
    assert "generate-rationales" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
