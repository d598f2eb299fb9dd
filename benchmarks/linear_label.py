"""A task whose label is linear in two facts, where rationales should not help: the counter-example to the quickstart.

python benchmarks/linear_label.py [--pairs 300 1000] [--seeds 17 18 19] [--out runs/linear-label] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from distill_llm.pipeline.run import run
from distill_llm.recipe.load import load_recipe

RECIPE = Path(__file__).with_suffix(".yaml")
CONTROL = "labels same steps"
ITEMS: tuple[str, ...] = (
    "anvil", "apple", "axe", "ball", "barrel", "bell", "bench", "bike", "book", "boot",
    "bottle", "bowl", "box", "brick", "broom", "bucket", "cake", "candle", "chair", "clock",
    "coat", "coin", "comb", "crate", "cup", "desk", "dish", "drum", "fan", "fork",
    "glass", "guitar", "hammer", "hat", "jar", "key", "kite", "knife", "ladder", "lamp",
    "map", "mirror", "mug", "nail", "needle", "pan", "pear", "pen", "piano", "pillow",
    "plate", "pot", "ring", "rope", "rug", "saw", "shovel", "spoon", "stone", "towel",
)  # fmt: skip
VALIDATION, TEST = 200, 500


def write_data(folder: Path, pairs: int) -> None:
    """Train, validation and test of different pairs; validation and test are the same for every number of pairs."""
    chance = random.Random("linear label")
    weights = dict(zip(ITEMS, chance.sample(range(1, len(ITEMS) + 1), len(ITEMS)), strict=True))
    drawn = list(itertools.combinations(ITEMS, 2))
    chance.shuffle(drawn)
    rows = [_row(chance.sample(pair, 2), weights) for pair in drawn]
    held_out = VALIDATION + TEST
    if not 0 < pairs <= len(rows) - held_out:
        raise SystemExit(f"--pairs {pairs}: expected 1 to {len(rows) - held_out}, as there are no more pairs.")
    folder.mkdir(parents=True, exist_ok=True)
    splits = {
        "validation": rows[:VALIDATION],
        "test": rows[VALIDATION:held_out],
        "train": rows[held_out : held_out + pairs],
    }
    for name, part in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def _row(pair: list[str], weights: dict[str, int]) -> dict[str, str]:
    first, second = pair
    return {
        "question": f"which is heavier , {first} or {second} ?",
        "label": max(pair, key=weights.__getitem__),
        "rationale": f"{first} weighs {weights[first]} . {second} weighs {weights[second]} .",
    }


def measure(pairs: int, seed: int, out: Path, overrides: list[str]) -> tuple[float, float]:
    """Test accuracy of label + rationale, and of labels only with the same rows and steps."""
    places = [f"task.data={out / f'data-{pairs}'}", f"run_dir={out / f'pairs-{pairs}-seed-{seed}'}", f"seed={seed}"]
    card = run(load_recipe(RECIPE, [*places, *overrides]))
    found = {entry.name: entry.accuracy for entry in card.entries}
    return found[card.student], found[CONTROL]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[300, 1000], help="training pairs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--out", type=Path, default=Path("runs/linear-label"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe; after -- behind a list")
    given = parser.parse_args()
    table = Table("pairs", "seed", "labels only %", "label + rationale %", "difference, points", box=None)
    began = time.monotonic()
    for pairs in given.pairs:
        write_data(given.out / f"data-{pairs}", pairs)
        scores = [measure(pairs, seed, given.out, given.overrides) for seed in given.seeds]
        means = (mean(ours for ours, _ in scores), mean(labels for _, labels in scores))
        names = [*map(str, given.seeds), "mean"]
        for name, (ours, labels) in zip(names, [*scores, means], strict=True):
            table.add_row(
                f"{pairs:,}", name, f"{100 * labels:.1f}", f"{100 * ours:.1f}", f"{100 * (ours - labels):+.1f}"
            )
    Console().print(table)
    print(f"{time.monotonic() - began:.0f} s; {TEST} test pairs, none of them in train")


if __name__ == "__main__":
    main()
