"""Every recipe of the repository: it loads, says what it is and how it is run, and fills a folder of its own."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from distill_llm.rationales.prompts import read_exemplars
from distill_llm.recipe.load import load_recipe
from distill_llm.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted((ROOT / "recipes").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT)) for path in PATHS]
COMMAND = re.compile(r"distill-llm (?:run|train|generate-rationales|sweep) (\S+\.yaml)")

every_recipe = pytest.mark.parametrize("name", NAMES)


def _head(name: str) -> list[str]:
    """The comment lines before the first key."""
    lines = (ROOT / name).read_text(encoding="utf-8").split("\n")
    count = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:count]]


def _recipes() -> dict[str, Recipe]:
    return {name: load_recipe(ROOT / name) for name in NAMES}


def test_there_are_recipes() -> None:
    assert "recipes/quickstart/teacher.yaml" in NAMES


@every_recipe
def test_recipe_loads(name: str) -> None:
    recipe = load_recipe(ROOT / name)
    assert recipe.student.model or recipe.student.config


@every_recipe
def test_head_says_what_it_is_and_how_it_is_run(name: str) -> None:
    head = _head(name)
    assert head, "a recipe starts with a comment"
    assert len(head[0].split()) >= 3, f"the first line says what it is, not {head[0]!r}"
    commands = COMMAND.findall("\n".join(head))
    assert name in commands, f"no line `distill-llm run {name}` in the head comment; found {commands}"


@every_recipe
def test_exemplars_are_there(name: str) -> None:
    recipe = load_recipe(ROOT / name)
    if recipe.rationales is None or not recipe.rationales.prompt.exemplars:
        return
    prompt = recipe.rationales.prompt
    assert len(read_exemplars(prompt.exemplars)) >= max(1, prompt.num_exemplars)


@every_recipe
def test_recipe_stays_under_runs(name: str) -> None:
    assert load_recipe(ROOT / name).folder.parts[0] == "runs"


def test_names_differ() -> None:
    names = Counter(recipe.name for recipe in _recipes().values())
    assert [name for name, count in names.items() if count > 1] == []


def test_folders_differ_and_none_is_in_another() -> None:
    folders = {name: recipe.folder for name, recipe in _recipes().items()}
    for name, folder in folders.items():
        inside = [other for other, there in folders.items() if other != name and (there / "x").is_relative_to(folder)]
        assert inside == [], f"{name} fills {folder}, where other recipes are filled too"
