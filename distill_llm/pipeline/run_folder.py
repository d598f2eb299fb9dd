"""The folder that one recipe fills, and the check that it is filled by one recipe alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill_llm.core.errors import ConfigError
from distill_llm.core.files import read_json, storage, write_text
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe, model_folder

_FREE = (
    "evaluate",
    "run_dir",
    "train.workers",
    "train.report_to",
    "train.keep_checkpoints",
)
"""Keys that no finished training depends on."""
_OF_ARMS = ("student.", "teachers", "scheme", "objective", "train")
"""Keys that decide single trainings: the plan of each says which (``pipeline.plan_facts``)."""
_OF_ALL = ("student.tokenizer", "student.prefixes")
"""Keys among these that decide the rows or the tokenizer of all."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def sweep(self) -> Path:
        """Tables of sweeps over this recipe, and the runs that they are made of."""
        return self.root / "sweep"

    @property
    def rationale_folder(self) -> Path:
        return self.root / "rationales"

    def journal(self, process: int = 0) -> Path:
        """Each process appends to its own."""
        return self.rationale_folder / (f"journal.{process}.jsonl" if process else "journal.jsonl")

    def journals(self) -> list[Path]:
        """Those of all processes that ever asked."""
        return sorted(self.rationale_folder.glob("journal*.jsonl"))

    def ledger(self, process: int = 0) -> Path:
        return self.rationale_folder / (f"ledger.{process}.json" if process else "ledger.json")

    def ledgers(self) -> list[Path]:
        return sorted(self.rationale_folder.glob("ledger*.json"))

    def dropped(self, process: int = 0) -> Path:
        """Which of several teachers a process asks no more, and why."""
        return self.rationale_folder / (f"dropped.{process}.json" if process else "dropped.json")

    def all_dropped(self) -> list[Path]:
        return sorted(self.rationale_folder.glob("dropped*.json"))

    def rationales(self, split: str) -> Path:
        return self.rationale_folder / f"{split}.parquet"

    @property
    def funnel(self) -> Path:
        return self.rationale_folder / "funnel.json"

    @property
    def spent(self) -> Path:
        """What asking came to, over all processes, as files and cards show it."""
        return self.rationale_folder / "spent.json"

    @property
    def rationale_card(self) -> Path:
        return self.rationale_folder / "README.md"

    @property
    def rationales_made_of(self) -> Path:
        return self.rationale_folder / "made_of.json"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def lacking(self) -> Path:
        """Teachers of soft labels that its ensembles do without, and why."""
        return self.root / "lacking_teachers.json"

    def signals(self, teacher: str) -> Path:
        """Where the signals of a cached teacher lie, unless it names another folder."""
        return self.root / "signals" / teacher

    @property
    def models(self) -> Path:
        return self.root / "models"

    def arm(self, name: str) -> Path:
        return self.models / name

    def model(self, name: str) -> Path:
        """The arm's finished model: what a user loads, and what another recipe may name as its teacher."""
        return model_folder(self.root, name)

    def result(self, name: str) -> Path:
        return self.arm(name) / "result.json"

    def predictions(self, name: str) -> Path:
        return self.root / "predictions" / f"{name}.jsonl"

    def plan(self, name: str) -> Path:
        """What decides the arm's weights."""
        return self.arm(name) / "plan.json"

    def planned_arms(self) -> list[str]:
        """Those whose training has begun."""
        return sorted(path.parent.name for path in self.models.glob("*/plan.json"))

    def set_aside(self, names: Sequence[str]) -> Path:
        """Moves these arms and their predictions to a new folder of ``models/.before``, which it gives."""
        before = self.models / ".before"
        with storage(before):
            taken = [int(path.name) for path in before.glob("*") if path.name.isdecimal()]
            folder = before / str(max(taken, default=0) + 1)
            folder.mkdir(parents=True)
            for name in names:
                self.arm(name).rename(folder / name)
                if self.predictions(name).exists():
                    self.predictions(name).rename(folder / name / "predictions.jsonl")
        return folder

    def save_recipe(self, recipe: Recipe) -> None:
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_text(self.recipe, text)

    @property
    def scorecard(self) -> Path:
        return self.root / "scorecard.json"

    def exports(self, arm: str) -> Path:
        """Where an arm's model lies in the formats of other runtimes."""
        return self.root / "exports" / arm

    def export(self, arm: str, name: str) -> Path:
        return self.exports(arm) / name

    @property
    def training_has_begun(self) -> bool:
        return self.models.exists() and any(self.models.iterdir())

    def trained_arms(self) -> list[str]:
        return sorted(path.parent.name for path in self.models.glob("*/result.json"))

    def completions_per_second(self, split: str) -> float | None:
        spent = read_json(self.spent).get(split) if self.spent.exists() else None
        return spent["completions"] / spent["seconds"] if spent and spent["seconds"] > 0 else None


def claim(recipe: Recipe) -> RunFolder:
    """The recipe's run folder, made or found again.

    Raises ConfigError where it holds something else, or models that were trained on other rows. Where only some of its
    trainings would be others, its recipe stays until ``settle`` has looked at each.
    """
    run = RunFolder(recipe.folder)
    with storage(run.root):
        found = {path.name for path in run.root.iterdir()} if run.root.exists() else set()
    if found and not run.recipe.exists() and not found <= {run.rationale_folder.name, run.sweep.name}:
        raise ConfigError(
            f"run_dir: {run.root} exists, is not empty, and is not a run folder. Choose another: run_dir=runs/my-run."
        )
    changed = _changed(recipe, run) if run.recipe.exists() else {}
    if not run.training_has_begun:
        # completions are found by their own keys, so that only the name and the task must agree
        _refuse({key: said for key, said in changed.items() if key.split(".")[0] in ("name", "task")}, run)
        run.save_recipe(recipe)
        return run
    _refuse({key: said for key, said in changed.items() if _is_of_all(key, recipe)}, run)
    if not changed:
        run.save_recipe(recipe)
    return run


def what_differs(recipe: Recipe, run: RunFolder) -> list[str]:
    """A line for each key that single trainings depend on and that is another in the folder's recipe."""
    return _shown(_changed(recipe, run))


def open_run(folder: str | Path, overrides: Sequence[str] = ()) -> tuple[RunFolder, Recipe]:
    """A run folder that exists, with its recipe; ``overrides`` may change how it is evaluated."""
    run = RunFolder(Path(folder).expanduser())
    if not run.recipe.is_file():
        raise ConfigError(f"{folder}: not a run folder: there is no {run.recipe.name} in it. Expected runs/<name>.")
    data = parse_yaml(run.recipe.read_text(encoding="utf-8"), str(run.recipe))
    for override in overrides:
        if not override.startswith("evaluate."):
            raise ConfigError(f"override '{override}': a finished run only takes overrides of evaluate.*")
    return run, recipe_from(data, [f"run_dir={run.root}", *overrides], source=str(run.recipe))


def settled(recipe: Recipe) -> dict[str, Any]:
    """All that a finished student and its validation depend on, by key: two recipes that agree in it train the same."""
    free = (*_free_keys(recipe), "name")
    flat = dict(_flat(recipe.model_dump(mode="json")))
    asked = {f"evaluate.{key}" for key in ("target", "max_new_tokens")}
    return {key: value for key, value in flat.items() if key in asked or not key.startswith(free)}


def _free_keys(recipe: Recipe) -> tuple[str, ...]:
    free = _FREE + (recipe.rationales.manner if recipe.rationales else ())
    teachers = recipe.teachers.items()
    return free + tuple(f"teachers.{name}.{key}" for name, teacher in teachers for key in sorted(teacher.manner))


def _changed(recipe: Recipe, run: RunFolder) -> dict[str, tuple[Any, Any]]:
    """Keys that some training depends on and that differ, with what is there and what is here."""
    before = dict(_flat(parse_yaml(run.recipe.read_text(encoding="utf-8"), str(run.recipe))))
    now = dict(_flat(recipe.model_dump(mode="json")))
    free = _free_keys(recipe)
    return {
        key: (before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and (key.startswith("evaluate.ablations") or not key.startswith(free))
    }


def _is_of_all(key: str, recipe: Recipe) -> bool:
    """Whether all trainings depend on the key: their rows or their tokenizer."""
    if key.startswith("evaluate.ablations"):
        return False
    if not recipe.student.tokenizer and key in ("student.model", "student.revision"):
        return True  # the tokenizer is the model's own
    return key.startswith(_OF_ALL) or not key.startswith(_OF_ARMS)


def _refuse(changed: Mapping[str, tuple[Any, Any]], run: RunFolder) -> None:
    if changed:
        lines = "\n".join(_shown(changed))
        raise ConfigError(
            f"run_dir: {run.root} was filled by another recipe:\n{lines}\nChoose another folder "
            f"(run_dir=runs/another), or delete this one to start anew."
        )


def _shown(changed: Mapping[str, tuple[Any, Any]]) -> list[str]:
    lines = [f"  {key}: {there!r} there, {here!r} here" for key, (there, here) in list(changed.items())[:8]]
    return lines + ([f"  and {len(changed) - 8} more"] if len(changed) > 8 else [])


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        yield path, value
        return
    for key, inner in items:
        yield from _flat(inner, f"{path}.{key}" if path else str(key))
