"""The grid of a sweep: which keys vary, over which values, and the recipe of each run."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_llm.core.errors import ConfigError
from distill_llm.core.files import fingerprint
from distill_llm.pipeline.run_folder import RunFolder, settled
from distill_llm.pipeline.sweep_words import short_keys, short_values, written
from distill_llm.recipe.load import overridden, parse_yaml, recipe_from, value_at
from distill_llm.recipe.recipe import Recipe

_EXAMPLE = "'objective.soft_label.loss.temperature=[1, 2, 4]'"
_REFUSED = {
    "name": "a sweep names its runs itself",
    "run_dir": "a sweep names the folders of its runs itself",
    "seed": "it draws the data's splits too, and the runs could not be compared. Take --seeds",
    "train.seed": "a setting is judged by all of its seeds, not by the luckiest. Take --seeds",
}


@dataclass(frozen=True, slots=True)
class Axis:
    """Keys that are given the same value, and the values to try; ``name`` and ``shown`` are short, for tables."""

    keys: tuple[str, ...]
    values: tuple[Any, ...]
    name: str
    shown: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """One value of each axis, by its place there, as overrides too, and a recipe for each seed."""

    places: tuple[int, ...]
    overrides: tuple[str, ...]
    recipes: tuple[Recipe, ...]


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """``settings`` are those of the grid that are tried; ``grid_size`` counts them all."""

    recipe_name: str
    main: RunFolder
    axes: tuple[Axis, ...]
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    grid_size: int

    @property
    def folder(self) -> Path:
        """Where the table of this sweep stands: one for the same keys, whatever their values."""
        return self.main.sweep / f"by-{_slug('+'.join(axis.name for axis in self.axes))}"

    @property
    def runs(self) -> list[tuple[Setting, int, Recipe]]:
        """Every run: its setting, its seed, its recipe. All settings get their first seed before any gets another."""
        by_seed = enumerate(self.seeds)
        return [(setting, seed, setting.recipes[number]) for number, seed in by_seed for setting in self.settings]

    def shown(self, setting: Setting) -> tuple[str, ...]:
        return tuple(axis.shown[place] for axis, place in zip(self.axes, setting.places, strict=True))

    def label(self, setting: Setting, seed: int | None = None) -> str:
        values = [f"{axis.name}={shown}" for axis, shown in zip(self.axes, self.shown(setting), strict=True)]
        return ", ".join([*values, *([f"seed {seed}"] if seed is not None and len(self.seeds) > 1 else [])])


@dataclass(frozen=True, slots=True)
class _Word:
    """What was typed: a value for some keys, or, once it is known to vary them, several."""

    keys: tuple[str, ...]
    value: Any

    def overrides(self, value: Any) -> list[str]:
        return [f"{key}={written(value) if value != '' else ''}" for key in self.keys]


def plan_sweep(
    data: Any, words: Sequence[str], *, seeds: int = 1, sample: int = 0, source: str = "recipe"
) -> SweepPlan:
    """The runs of a sweep over a recipe's mapping, each recipe checked. Writes nothing.

    A word ``key=[a, b]`` varies the key, ``key,other=[a, b]`` both together; where the key takes a list by itself, only
    a list of lists varies it. Any other word is an override, the same for all runs. With ``sample`` only so many
    settings are tried, drawn with the recipe's seed: a larger sample holds the smaller one.
    """
    if seeds < 1 or sample < 0:
        raise ConfigError(f"sweep: --seeds {seeds} --sample {sample}; expected 1 or more seeds, and 0 (all) or more.")
    typed = [_parse(word) for word in words]
    varying = _varying(data, typed)
    axes = _make_axes([word for word, varies in zip(typed, varying, strict=True) if varies])

    def recipe(places: Sequence[int], *more: str) -> Recipe:
        values = iter([axis.values[place] for axis, place in zip(axes, places, strict=True)])
        pairs = [(word, next(values) if varies else word.value) for word, varies in zip(typed, varying, strict=True)]
        own = [override for word, value in pairs for override in word.overrides(value)]
        return recipe_from(data, [*own, *more], source=f"{source} with {' '.join(_overrides(axes, places))}")

    grid = list(itertools.product(*(range(len(axis.values)) for axis in axes)))
    first = recipe(grid[0])
    main = RunFolder(first.folder)
    numbers = tuple(first.training_seed + number for number in range(seeds))
    settings = []
    for places in _drawn(grid, sample, first.seed):
        label = ",".join(f"{axis.name}={axis.shown[place]}" for axis, place in zip(axes, places, strict=True))
        made = [recipe(places, *([f"train.seed={seed}"] if seed != numbers[0] else [])) for seed in numbers]
        placed = [_placed(one, main, f"{label},seed={seed}") for one, seed in zip(made, numbers, strict=True)]
        settings.append(Setting(places, tuple(_overrides(axes, places)), tuple(placed)))
    _refuse_the_same(settings)
    return SweepPlan(first.name, main, axes, tuple(settings), numbers, len(grid))


def _parse(word: str) -> _Word:
    path, equals, value = word.partition("=")
    keys = tuple(path.split(","))
    if not equals or not all(keys):
        raise ConfigError(
            f"'{word}': expected key=value, the same for all runs, or key=[value, value] to try, such as {_EXAMPLE}."
        )
    return _Word(keys, parse_yaml(value, f"'{word}'") if value else "")


def _varying(data: Any, words: Sequence[_Word]) -> list[bool]:
    """Which of the words vary their keys: lists, but for those that the key takes by itself."""

    def takes_list(word: _Word, mapping: Any) -> bool:
        inner = all(isinstance(item, list) for item in word.value) and word.value
        return isinstance(value_at(mapping, word.keys[0]), list) and not inner

    fixed = [override for word in words if not isinstance(word.value, list) for override in word.overrides(word.value)]
    as_typed = overridden(data, fixed)
    varying = [isinstance(word.value, list) and not takes_list(word, as_typed) for word in words]
    pairs = zip(words, varying, strict=True)
    fixed = [override for word, varies in pairs if not varies for override in word.overrides(word.value)]
    try:  # what the file leaves out may be a list by default
        filled = recipe_from(data, fixed).model_dump(mode="json")
    except ConfigError:  # what varies may be what it lacks; the recipe of each run is checked soon
        return varying
    return [varies and not takes_list(word, filled) for word, varies in zip(words, varying, strict=True)]


def _make_axes(words: Sequence[_Word]) -> tuple[Axis, ...]:
    if not words:
        raise ConfigError(f"sweep: nothing varies. Give a key a list of values to try, such as {_EXAMPLE}.")
    keys = [key for word in words for key in word.keys]
    for key in keys:
        if key in _REFUSED:
            raise ConfigError(f"sweep: {key} cannot vary: {_REFUSED[key]}.")
        if keys.count(key) > 1:
            raise ConfigError(f"sweep: {key} is given several lists of values. Put them into one.")
    for word in words:
        if not word.value:
            raise ConfigError(f"sweep: {','.join(word.keys)}=[] has no value to try. Expected [value, value].")
    names = short_keys([word.keys[0] for word in words])
    return tuple(
        Axis(word.keys, tuple(word.value), name, tuple(short_values(word.value)))
        for word, name in zip(words, names, strict=True)
    )


def _overrides(axes: Sequence[Axis], places: Sequence[int]) -> Iterator[str]:
    for axis, place in zip(axes, places, strict=True):
        yield from _Word(axis.keys, None).overrides(axis.values[place])


def _drawn(grid: list[tuple[int, ...]], sample: int, seed: int) -> list[tuple[int, ...]]:
    order = list(range(len(grid)))
    if sample:
        random.Random(f"{seed} sweep").shuffle(order)
    return [grid[number] for number in sorted(order[: sample or None])]


def _placed(recipe: Recipe, main: RunFolder, label: str) -> Recipe:
    """The recipe in the folder of its run, which is found again by all that the training depends on."""
    key = fingerprint(settled(recipe))
    runs = main.sweep / "runs"
    found = sorted(runs.glob(f"*-{key}")) or [runs / f"{_slug(label)}-{key}"]
    return recipe.model_copy(update={"run_dir": str(found[0])})


def _refuse_the_same(settings: Sequence[Setting]) -> None:
    seen: dict[str, Setting] = {}
    for setting in settings:
        other = seen.setdefault(setting.recipes[0].run_dir.rpartition("-")[2], setting)
        if other is not setting:
            raise ConfigError(
                f"sweep: {' '.join(other.overrides)} and {' '.join(setting.overrides)} train the same student: it does "
                "not depend on what differs. Take one of them out."
            )


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+=,-]+", "-", text)[:80].strip("-")
