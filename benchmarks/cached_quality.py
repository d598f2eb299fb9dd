"""Does a student learn as much from a cache as beside its teacher? The scarce shop case, over several seeds.

    python benchmarks/cached_quality.py --seeds 3 --out runs/benchmarks/cached [KEY=VALUE]...

Needs the quickstart's teacher (``distill-llm run recipes/quickstart/teacher.yaml``). All ways of hearing the teacher
have the same initial weights, rows, order and steps; a seed draws others of each. Prints, for each way, mean and
standard deviation of test accuracy, and of its paired difference to the online teacher. Resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev

import distill_llm

RECIPE = "recipes/cached-teacher.yaml"
WAYS: dict[str, list[str]] = {
    "labels and rationales only": ["objective.soft_label.weight=1e-9", "objective.soft_label.teacher=big"],
    "online": ["objective.soft_label.teacher=big"],
    "top_k, k 8": ["teachers.kept.payload={kind: top_k, k: 8}"],
    "top_k, k 2": ["teachers.kept.payload={kind: top_k, k: 2}"],
    "sampled, 12": ["teachers.kept.payload={kind: sampled, samples: 12}"],
    "last_hidden, bfloat16": ["teachers.kept.payload={kind: last_hidden}"],
    "last_hidden, float32": ["teachers.kept.payload={kind: last_hidden, dtype: float32}"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/cached"))
    parser.add_argument("--targets", default="[label, rationale]", help="rows of the soft term")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    scores: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in range(1, asked.seeds + 1):
        for way, changes in WAYS.items():
            name = way.replace(", ", "-").replace(" ", "-")
            own = [f"seed={seed}", f"task.train_stream={100 + seed}", f"run_dir={asked.out}/{name}-{seed}"]
            same = ["evaluate.controls=[]", "evaluate.teacher=false", f"objective.soft_label.targets={asked.targets}"]
            card = distill_llm.run(distill_llm.load_recipe(RECIPE, [*own, *same, *changes, *asked.overrides]))
            accuracy = next(entry.accuracy for entry in card.entries if entry.name == "student")
            scores[way].append(accuracy)
            print(f"seed {seed}: {way}: {accuracy:.1%}", flush=True)
    _print_table(scores)


def _print_table(scores: dict[str, list[float]]) -> None:
    print("\n| how the teacher is heard | accuracy % | minus online, points |\n|---|---:|---:|")
    for way, of_seeds in scores.items():
        gaps = [one - online for one, online in zip(of_seeds, scores["online"], strict=True)]
        print(f"| {way} | {_spread(of_seeds)} | {'-' if way == 'online' else _spread(gaps, sign='+')} |")


def _spread(shares: list[float], sign: str = "") -> str:
    deviation = f" ± {100 * stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * mean(shares):{sign}.1f}{deviation}"


if __name__ == "__main__":
    main()
