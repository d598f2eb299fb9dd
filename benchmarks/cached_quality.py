"""Does a student learn as much from a cache as beside its teacher? The scarce shop case, over several seeds.

    python benchmarks/cached_quality.py [KEY=VALUE]... [--seeds 3] [--workers 2] [--out FOLDER]

Needs the quickstart's teacher (``distill-llm run recipes/quickstart/teacher.yaml``). All ways of hearing the teacher
have the same initial weights, rows, order and steps; a seed draws others of each. Prints, for each way, mean and
standard deviation of test accuracy, and of its paired difference to the online teacher. Resumes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from divergences import run_all

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


@dataclass(frozen=True)
class Job:
    """One run of the recipe: a way of hearing the teacher, a seed, and the overrides."""

    way: str
    seed: int
    overrides: tuple[str, ...]


def run(job: Job) -> float:
    """The student's accuracy; runs in a process of its own."""
    card = distill_llm.run(distill_llm.load_recipe(RECIPE, job.overrides))
    return next(entry.accuracy for entry in card.entries if entry.name == "student")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe, for all; before the options")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, each with one thread")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/cached"))
    parser.add_argument("--targets", default="[label, rationale]", help="rows of the soft term")
    asked = parser.parse_args()
    jobs = []
    for seed in range(1, asked.seeds + 1):
        for way, changes in WAYS.items():
            name = way.replace(", ", "-").replace(" ", "-")
            own = [f"seed={seed}", f"task.train_stream={100 + seed}", f"run_dir={asked.out}/{name}-{seed}"]
            same = ["evaluate.controls=[]", "evaluate.teacher=false", f"objective.soft_label.targets={asked.targets}"]
            jobs.append(Job(way, seed, (*own, *same, *changes, *asked.overrides)))
    waiting = iter(jobs)

    def say(accuracy: float) -> None:
        job = next(waiting)
        print(f"seed {job.seed}: {job.way}: {accuracy:.1%}", flush=True)

    scores: dict[str, list[float]] = {way: [] for way in WAYS}
    for job, accuracy in zip(jobs, run_all(run, jobs, asked.workers, say), strict=True):
        scores[job.way].append(accuracy)
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
