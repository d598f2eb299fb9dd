"""The experiments of the papers that distillation began with, at the size of a CPU: ours beside theirs, over seeds.

    python benchmarks/originals.py [KEY=VALUE]... [--parts temperature left_out two_classes chain eight_times]
        [--seeds 3] [--workers 2] [--only WAY ...] [--out FOLDER]

One table a part (originals_tables.py says what theirs were). Teachers are trained first, in OUT/teachers; eight_times
needs the quickstart's (``distill-llm run recipes/quickstart/teacher.yaml``). Each seed draws other initial weights,
another order and other training questions, the same for all ways. What has been trained stands in OUT/results.jsonl,
under a key that holds its whole recipe, and is not trained again. Writes OUT/PART.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from divergences import ask_teacher, read_options, run_all
from originals_tables import TABLES, Found
from schemes import objective, scheme

from distill_llm.core.files import fingerprint, write_text
from distill_llm.core.journal import Journal
from distill_llm.recipe.load import load_recipe

BILL = "recipes/transfer-set.yaml"  # five classes, from cheap to dear
SHOP = "recipes/quickstart/ample.yaml"
TEACHER = "recipes/quickstart/teacher.yaml"

BILL_TASK = ['task={"kind": "bill", "train_size": 3000, "train_stream": 1}', "train.max_input_tokens=16"]
TEACHERS: dict[str, list[str]] = {
    "bill": ["name=bill-teacher", *BILL_TASK],
    "deep": ["name=deep-teacher", *BILL_TASK, "student.config.d_model=64", "student.config.num_layers=6"],
}


@dataclass(frozen=True)
class Way:
    """One training: a recipe, what it changes, and the teacher of its soft labels; empty: the recipe's own."""

    recipe: str
    teacher: str
    overrides: tuple[str, ...]


def soft(temperature: float, target: str = "label") -> dict[str, Any]:
    loss = {"kind": "forward_kl", "temperature": temperature}
    return {"name": f"soft_{target}", "loss": loss, "targets": [target], "teacher": "big"}


def hard(target: str, **changes: Any) -> dict[str, Any]:
    return {"name": target, "loss": {"kind": "cross_entropy"}, "targets": [target]} | changes


ALL_CLASSES = ("transfer=null", "evaluate.label_bias={}")
NO_CONTROL = "evaluate.controls=[]"
SHORT = ("train.max_steps=200", "train.validate_every=200")
TEMPERATURES = (1.0, 2.5, 4.0, 8.0, 20.0)
WIDTHS: dict[str, tuple[str, ...]] = {
    "wide": (),
    "narrow": ("student.config.d_model=8", "student.config.d_kv=2", "student.config.d_ff=16"),
}


def temperature_ways() -> dict[str, Way]:
    """Soft labels alone, so that nothing else weighs more or less where the temperature changes."""
    own = (*ALL_CLASSES, NO_CONTROL, *SHORT)
    return {
        f"{width}, temperature {number:g}": Way(BILL, "bill", (*own, objective(soft(number)), *sizes))
        for width, sizes in WIDTHS.items()
        for number in TEMPERATURES
    }


def left_out_ways() -> dict[str, Way]:
    """The recipe as it is, and with the class that it leaves out; each with its control of hard labels."""
    return {"all classes": Way(BILL, "bill", ALL_CLASSES), "without fair": Way(BILL, "bill", ())}


def two_class_ways() -> dict[str, Way]:
    only = ('transfer={"only": ["low", "high"]}', 'evaluate.label_bias={"low": "fit", "high": "fit"}')
    return {"low and high only": Way(BILL, "bill", only)}


def chain_ways() -> dict[str, Way]:
    """From six layers over three and two to one, about equal ratios; all of one width, with few questions."""
    shallow = (*ALL_CLASSES, NO_CONTROL, *SHORT, "task.train_size=500", "student.config.num_layers=1")
    assistants = [{"name": name, "config": {"num_layers": layers}} for name, layers in (("three", 3), ("two", 2))]
    ways = {
        "labels alone": Way(BILL, "deep", (*shallow, objective(hard("label")))),
        "direct": Way(BILL, "deep", shallow),
    }
    for guidance in ("nearest", "dense", "ensemble"):
        own = scheme(kind="assistant_chain", teacher="big", guidance=guidance, assistants=assistants)
        ways[f"chain, {guidance}"] = Way(BILL, "deep", (*shallow, own))
    return ways


def eight_times_ways() -> dict[str, Way]:
    """The quickstart's ample case (docs/benchmarks.md), with the rationale written before the label and more steps."""
    own = (
        NO_CONTROL,
        "evaluate.ablations={}",
        objective(hard("rationale_then_label"), soft(2.0, "rationale_then_label")),
        "evaluate.target=rationale_then_label",
        "evaluate.max_new_tokens=30",
    )
    return {
        f"{steps:,} steps": Way(SHOP, "", (*own, f"train.max_steps={steps}", f"train.validate_every={steps // 4}"))
        for steps in (1000, 2000)
    }


PARTS: dict[str, dict[str, Way]] = {
    "temperature": temperature_ways(),
    "left_out": left_out_ways(),
    "two_classes": two_class_ways(),
    "chain": chain_ways(),
    "eight_times": eight_times_ways(),
}


@dataclass(frozen=True)
class Job:
    """``key``: its recipe's fingerprint. ``asks``: recipe and overrides of the student as whom a teacher is asked."""

    way: str
    seed: int
    key: str
    recipe: str
    overrides: tuple[str, ...]
    asks: tuple[str, tuple[str, ...]] | None = None


def teacher_job(name: str, out: Path, overrides: Sequence[str]) -> Job:
    own = (*TEACHERS[name], *overrides)
    key = fingerprint([TEACHER, load_recipe(TEACHER, own).model_dump(mode="json")])
    way = next(way for ways in PARTS.values() for way in ways.values() if way.teacher == name)
    folder = out / "teachers" / f"{name}-{key}"
    asks = (way.recipe, (*placed(way, str(folder)), *overrides))
    return Job(f"teacher: {name}", 0, key, TEACHER, (*own, f"run_dir={folder}"), asks)


def student_job(name: str, way: Way, seed: int, teacher: str, out: Path, overrides: Sequence[str]) -> Job:
    """``teacher``: the folder of its run; empty: the recipe's own."""
    own = (*placed(way, teacher), f"seed={seed}", f"task.train_stream={100 + seed}", *overrides)
    key = fingerprint([way.recipe, load_recipe(way.recipe, own).model_dump(mode="json")])
    folder = out / f"{''.join(one if one.isalnum() else '-' for one in name)}-{seed}-{key}"
    return Job(name, seed, key, way.recipe, (*own, f"run_dir={folder}"))


def placed(way: Way, teacher: str) -> tuple[str, ...]:
    """The way's overrides, and where its teacher lies."""
    if not teacher:
        return way.overrides
    places = (f"teachers.big.model={teacher}/models/student/model", f"student.tokenizer={teacher}/tokenizer")
    return (*way.overrides, *places)


def train(job: Job) -> dict[str, Any]:
    """Runs in a process of its own; gives the journal's entry."""
    import distill_llm

    began = time.monotonic()
    recipe = load_recipe(job.recipe, job.overrides)
    card = distill_llm.run(recipe).model_dump(mode="json")
    entry: dict[str, Any] = {"key": job.key, "way": job.way, "seed": job.seed, "card": card}
    entry["steps"] = sum(stage.share_of_steps for stage in recipe.stages)
    if job.asks is not None:
        entry["asked"] = ask_teacher(load_recipe(*job.asks))
    return entry | {"seconds": round(time.monotonic() - began, 1)}


def finished(jobs: Sequence[Job], journal: Journal, workers: int) -> list[dict[str, Any]]:
    """The journal's entries of all jobs; those that are not there are trained."""

    def note(entry: Mapping[str, Any]) -> None:
        journal.append(entry)
        scores = ", ".join(f"{one['name']} {one['accuracy']:.1%}" for one in entry["card"]["entries"])
        print(f"{entry['way']}, seed {entry['seed']}: {scores}; {entry['seconds']:.0f} s", flush=True)

    missing = [job for job in jobs if job.key not in journal]
    if missing:
        run_all(train, missing, workers, note)
    return [journal.read(job.key) | {"way": job.way} for job in jobs]


def main(arguments: Sequence[str] | None = None) -> None:
    given = read_options(arguments, __doc__, seeds=3, out="runs/originals", parts=tuple(PARTS))
    began = time.monotonic()
    asked = {part: _chosen(ways, given.only) for part, ways in PARTS.items() if part in given.parts}
    names = sorted({way.teacher for ways in asked.values() for way in ways.values()} - {""})
    with Journal(given.out / "results.jsonl") as journal:
        above = [teacher_job(name, given.out, given.overrides) for name in names]
        entries = finished(above, journal, given.workers)
        folders = {"": ""} | {
            name: str(load_recipe(TEACHER, job.overrides).folder) for name, job in zip(names, above, strict=True)
        }
        for part, ways in asked.items():
            jobs = [
                student_job(name, way, seed, folders[way.teacher], given.out, given.overrides)
                for seed in range(1, given.seeds + 1)  # so that what is there after a stop compares all ways
                for name, way in ways.items()
            ]
            trained = finished(jobs, journal, given.workers)
            table = TABLES[part](Found([*entries, *trained]))
            write_text(given.out / f"{part}.md", f"{table}\n\n{about(jobs, trained, given.overrides)}\n")
            print(f"\n{table}\n\n{about(jobs, trained, given.overrides)}\n", flush=True)
    print(f"{time.monotonic() - began:.0f} s in all, with {given.workers} workers.")


def _chosen(ways: Mapping[str, Way], only: Sequence[str]) -> dict[str, Way]:
    return {name: way for name, way in ways.items() if not only or name in only}


def about(jobs: Sequence[Job], trained: Sequence[Mapping[str, Any]], overrides: Sequence[str]) -> str:
    """One line below a table: how it was made."""
    if not jobs:
        return "None of its ways was asked for."
    settings = [load_recipe(job.recipe, job.overrides).train for job in jobs]
    steps = " to ".join(f"{one:,}" for one in sorted({one.max_steps for one in settings}))
    seeds = len({job.seed for job in jobs})
    seconds = sum(one["seconds"] for one in trained)
    changed = " ".join(overrides) or "the recipes as they are"
    return (
        f"{steps} steps of {settings[0].rows_per_step} rows at {settings[0].learning_rate:g}, untuned; {seeds} seeds; "
        f"{seconds:.0f} s; {changed}."
    )


if __name__ == "__main__":
    main()
