"""The quickstart's cases over several seeds: what one run's intervals do not cover.

    python benchmarks/shop_seeds.py --case scarce --seeds 6 --out /tmp/shop [KEY=VALUE]...

Needs the quickstart's teacher (``distill-llm run recipes/quickstart/teacher.yaml``). Each seed draws other initial
weights, another order of rows, and another pool of questions. Prints, for each model, mean and standard deviation of
test accuracy, and the student's paired difference to it: mean, standard deviation, and on how many seeds it was
positive. Resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev

import distill_llm
from distill_llm.evaluation.scorecard import Scorecard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["scarce", "ample"], default="scarce")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/shop"))
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    cards = []
    for seed in range(1, asked.seeds + 1):
        own = [f"seed={seed}", f"task.train_stream={100 + seed}", f"run_dir={asked.out}/{asked.case}-{seed}"]
        recipe = distill_llm.load_recipe(f"recipes/quickstart/{asked.case}.yaml", [*own, *asked.overrides])
        cards.append(distill_llm.run(recipe))
        scores = ", ".join(f"{entry.name} {entry.accuracy:.1%}" for entry in cards[-1].entries)
        print(f"seed {seed}: {scores}", flush=True)
    _print_table(cards)


def _print_table(cards: list[Scorecard]) -> None:
    print("\n| model | accuracy % | student minus it, points | positive on |\n|---|---:|---:|---:|")
    for name in [entry.name for entry in cards[0].entries]:
        scores = [next(entry.accuracy for entry in card.entries if entry.name == name) for card in cards]
        gaps = [c.difference for card in cards for c in card.comparisons if c.other == name]
        gap = f"{_spread(gaps, sign='+')} | {sum(gap > 0 for gap in gaps)} of {len(gaps)}" if gaps else "- | -"
        print(f"| {name} | {_spread(scores)} | {gap} |")


def _spread(shares: list[float], sign: str = "") -> str:
    deviation = f" ± {100 * stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * mean(shares):{sign}.1f}{deviation}"


if __name__ == "__main__":
    main()
