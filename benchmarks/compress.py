"""What quantization and pruning cost, with distillation and without, on the quickstart's questions over several seeds.

    python benchmarks/compress.py [KEY=VALUE]... [--seeds 5] [--workers 2] [--parts int4 int2 pruned] [--out FOLDER]

Needs the quickstart's teacher (``distill-llm run recipes/quickstart/teacher.yaml``). Runs the recipe qat-int4,
the same with weights of 2 bits, and prune-half.yaml at its first learning rate; each seed with other initial weights,
another order and another pool of questions. The differences are paired by seed; their interval is that of their mean
(Student's t over seeds). Resumes; writes OUT/compress.md and OUT/compress.json.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from divergences import read_options, run_all
from schemes import Job, paired_interval, spread

from distill_llm.core.files import read_json, write_json
from distill_llm.evaluation.text_tables import short_bytes, short_count
from distill_llm.recipe.load import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes" / "compress"
QUANTIZED = (
    ("student", "quantized afterwards"),
    ("student", "longer quantized afterwards"),
    ("student", "full precision"),
    ("quantized afterwards", "full precision"),
)
PRUNED = (("student", "labels same steps"), ("student", "from scratch"), ("student", "one cut"))


@dataclass(frozen=True)
class Part:
    """One recipe of recipes/compress; ``pairs`` are compared, by the names that they have on the scorecard."""

    recipe: str
    pairs: tuple[tuple[str, str], ...]
    overrides: tuple[str, ...] = ()


PARTS = {
    "int4": Part("qat-int4", QUANTIZED),
    "int2": Part("qat-int4", QUANTIZED, ("scheme.quantize.weights=int2",)),
    "pruned": Part("prune-half", PRUNED, ("train.tune=[]",)),
}


@dataclass(frozen=True)
class Outcome:
    """``models``: accuracy, bytes on disk, parameters and examples a second of each model on the scorecard."""

    part: str
    seed: int
    models: Mapping[str, Mapping[str, Any]]
    seconds: float


def train(job: Job) -> Outcome:
    """Runs in a process of its own; what an earlier run came to is read."""
    import distill_llm

    done = job.folder / "outcome.json"
    if not done.exists():
        began = time.monotonic()
        card = distill_llm.run(load_recipe(RECIPES / f"{PARTS[job.way].recipe}.yaml", job.overrides))
        models = {
            entry.name: {
                "accuracy": entry.accuracy,
                "bytes": entry.bytes,
                "parameters": entry.parameters,
                "examples_per_second": entry.examples_per_second,
            }
            for entry in card.entries
        }
        write_json(done, {"models": models, "seconds": round(time.monotonic() - began, 1)})
    return Outcome(job.way, job.seed, **read_json(done))


def tables(outcomes: Sequence[Outcome]) -> str:
    """Markdown: of each recipe its models, then what was compared."""
    lines: list[str] = []
    for name in dict.fromkeys(one.part for one in outcomes):
        own, part = [one for one in outcomes if one.part == name], PARTS[name]
        words = " ".join((f"recipes/compress/{part.recipe}.yaml", *part.overrides))
        lines += [
            f"**`{words}`**, {len(own)} seeds, {mean(one.seconds for one in own):.0f} s each",
            "",
            "| model | accuracy %, mean ± sd | parameters | on disk | smaller than the teacher | examples/s |",
            "|---|---:|---:|---:|---:|---:|",
            *(_model(own, model) for model in own[0].models),
            "",
            "| difference | points [95% interval] | positive on |",
            "|---|---:|---:|",
            *(_difference(own, *pair) for pair in part.pairs if set(pair) <= set(own[0].models)),
            "",
        ]
    return "\n".join(lines)


def _model(outcomes: Sequence[Outcome], name: str) -> str:
    facts = [one.models[name] for one in outcomes]
    first = facts[0]
    teacher = outcomes[0].models.get("teacher", {}).get("bytes")
    smaller = f"{teacher / first['bytes']:.1f} x" if teacher and first["bytes"] else ""
    speeds = [one["examples_per_second"] for one in facts if one["examples_per_second"]]
    return (
        f"| {name} | {spread([one['accuracy'] for one in facts])} | {short_count(first['parameters'] or 0)} | "
        f"{short_bytes(first['bytes'] or 0)} | {smaller} | {f'{mean(speeds):,.0f}' if speeds else ''} |"
    )


def _difference(outcomes: Sequence[Outcome], one: str, other: str) -> str:
    gaps = [seed.models[one]["accuracy"] - seed.models[other]["accuracy"] for seed in outcomes]
    return f"| {one} - {other} | {paired_interval(gaps)} | {sum(gap > 0 for gap in gaps)} of {len(gaps)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    given = read_options(arguments, __doc__, seeds=5, out="runs/compress", parts=tuple(PARTS))
    began = time.monotonic()
    jobs = []
    for seed in range(1, given.seeds + 1):
        for part in given.parts:
            folder = given.out / f"{part}-{seed}"
            drawn = (f"seed={seed}", f"task.train_stream={100 + seed}", f"run_dir={folder}", "train.workers=1")
            jobs.append(Job(part, seed, (*PARTS[part].overrides, *drawn, *given.overrides), folder))

    def say(outcome: Outcome) -> None:
        came = ", ".join(f"{name} {facts['accuracy']:.1%}" for name, facts in outcome.models.items())
        print(f"{outcome.part}, seed {outcome.seed}: {came} ({outcome.seconds:.0f} s)", flush=True)

    outcomes = run_all(train, jobs, given.workers, say)
    shown = tables(outcomes)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "compress.md").write_text(f"{shown}\n", encoding="utf-8")
    write_json(given.out / "compress.json", {f"{one.part}, seed {one.seed}": one.models for one in outcomes})
    print(f"\n{shown}\n{time.monotonic() - began:.0f} s in all, with {given.workers} workers.")


if __name__ == "__main__":
    main()
