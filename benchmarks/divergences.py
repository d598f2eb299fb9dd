"""Every loss with a teacher trains a small student on the quickstart's questions, from the teacher's words alone.

    python benchmarks/divergences.py [KEY=VALUE]... [--seeds 3] [--workers 2] [--only forward_kl ...] [--out FOLDER]

Needs the quickstart's teacher (``distill-llm run recipes/quickstart/teacher.yaml``). Losses are found by their folder.
A loss that needs more than a teacher's logits, or that this recipe does not suit, is listed with the reason. For
orientation: the teacher itself, asked as the student is; a student of labels alone; and, where there are caches of
signals, forward KL against each of them beside that against the teacher as it is run (`forward_kl`).

A loss has **trained** its student where the mean accuracy is at least 90% of the teacher's. Each seed draws other
initial weights, another order and another pool of questions, the same for all losses. Resumes; writes
OUT/divergences.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

from distill_llm.core.component import kinds
from distill_llm.core.errors import DistillError
from distill_llm.losses.base import Loss
from distill_llm.recipe.load import load_recipe
from distill_llm.recipe.recipe import Recipe

Given = TypeVar("Given")
Done = TypeVar("Done")

RECIPE = Path(__file__).with_suffix(".yaml")
TRAINED = 0.9  # of the teacher's accuracy
LABELS = "labels only"
CACHES: dict[str, dict[str, Any]] = {
    "top 32 words": {"kind": "top_k", "k": 32},
    "12 drawn words": {"kind": "sampled", "samples": 12},
    "last hidden states": {"kind": "last_hidden"},
}


@dataclass(frozen=True)
class Job:
    """One training: a way of learning, a seed, and the recipe's overrides."""

    way: str
    seed: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """``accuracy`` is None where nothing could be trained; ``why`` says so."""

    way: str
    seed: int
    accuracy: float | None
    seconds: float
    why: str = ""


def ways_of(only: Sequence[str]) -> dict[str, list[str]]:
    """Overrides of each way of learning, by its name in the table."""
    hard = {"name": "label", "loss": {"kind": "cross_entropy"}, "targets": ["label"]}
    ways = {LABELS: [f"objective={json.dumps([hard])}"]}
    for kind, loss in kinds(Loss, "distill_llm.losses").items():
        if loss.needs_teacher:
            ways[kind] = [f"objective={json.dumps([_soft(kind, 'big')])}"]
    if importlib.util.find_spec("distill_llm.teachers.cached") is not None:
        for name, payload in CACHES.items():
            cached = {"kind": "cached", "of": "big", "payload": payload}
            soft = [f"objective={json.dumps([_soft('forward_kl', 'soft')])}", f"teachers.soft={json.dumps(cached)}"]
            ways[f"forward_kl, cached {name}"] = soft
    return {way: overrides for way, overrides in ways.items() if not only or way in only}


def _soft(kind: str, teacher: str) -> dict[str, Any]:
    return {"name": "soft", "loss": {"kind": kind}, "targets": ["label"], "teacher": teacher}


def train(job: Job) -> Outcome:
    """Runs in a process of its own."""
    import distill_llm

    began = time.monotonic()
    try:
        card = distill_llm.run(load_recipe(RECIPE, job.overrides))
    except DistillError as error:
        return Outcome(job.way, job.seed, None, 0.0, str(error).splitlines()[-1].strip())
    accuracy = next(entry.accuracy for entry in card.entries if entry.name == card.student)
    return Outcome(job.way, job.seed, accuracy, time.monotonic() - began)


def ask_teacher(recipe: Recipe) -> float:
    """The accuracy of the recipe's teacher `big` when it is asked for the label alone, as the student is."""
    from distill_llm.core.progress import SILENT
    from distill_llm.models.load import load_model, read_tokenizer
    from distill_llm.pipeline.trial import answers, student_view

    place = recipe.teachers["big"].model_dump()["model"]
    model = load_model(place, where="teachers.big")
    view = student_view(recipe, read_tokenizer(place, where="teachers.big"), model.config.is_encoder_decoder)
    test = recipe.task.load(recipe.seed).test
    said, _ = answers(recipe, model, view, test, "label", progress=SILENT, name="teacher")
    return mean(bool(one.correct) for one in said.items)


def one_thread() -> None:
    import torch

    from distill_llm.core.quiet import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()


def run_all(
    work: Callable[[Given], Done], jobs: Sequence[Given], workers: int, say: Callable[[Done], None]
) -> list[Done]:
    """What ``work`` makes of each job, in order; each is said as soon as those before it are known."""
    outcomes = []
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=one_thread) as pool:
        for outcome in pool.map(work, jobs):
            say(outcome)
            outcomes.append(outcome)
    return outcomes


def table(outcomes: Sequence[Outcome], teacher: float) -> str:
    """Markdown: a row for each way, in the order of the outcomes."""
    lines = [
        "| the student learns from | accuracy %, mean ± sd | of the teacher's | trained | seconds a training |",
        "|---|---:|---:|---|---:|",
        f"| (the teacher itself) | {100 * teacher:.1f} | | | |",
    ]
    for way in dict.fromkeys(outcome.way for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.way == way]
        scores = [outcome.accuracy for outcome in own if outcome.accuracy is not None]
        if not scores:
            lines.append(f"| {way} | left out: {own[0].why} | | | |")
            continue
        deviation = f" ± {100 * stdev(scores):.1f}" if len(scores) > 1 else ""
        share = mean(scores) / teacher
        seconds = mean(outcome.seconds for outcome in own)
        lines.append(
            f"| {way} | {100 * mean(scores):.1f}{deviation} | {100 * share:.0f}% | "
            f"{'yes' if share >= TRAINED else 'no'} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def read_options(
    arguments: Sequence[str] | None, about: str | None, *, seeds: int, out: str, parts: Sequence[str] = ()
) -> argparse.Namespace:
    """What a script takes that trains in many ways with several seeds each; ``about`` is shown by --help.

    ``parts``: those that a script of several tables has, of which --parts takes some.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe, for all; before the options")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--workers", type=int, default=2, help="trainings side by side, each with one thread")
    parser.add_argument("--only", nargs="+", default=[], help="of the ways in the table")
    if parts:
        parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="tables to make")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    given = read_options(arguments, __doc__, seeds=3, out="runs/divergences")
    teacher = ask_teacher(load_recipe(RECIPE, given.overrides))
    if not teacher:
        sys.exit("teachers.big: not one of its answers is right, so that there is nothing to learn from it.")
    began = time.monotonic()
    jobs = []
    for seed in range(1, given.seeds + 1):  # so that what is there after a stop compares all ways
        for way, own in ways_of(given.only).items():
            folder = given.out / f"{way.replace(' ', '-').replace(',', '')}-{seed}"
            drawn = [f"seed={seed}", f"task.train_stream={100 + seed}", f"run_dir={folder}"]
            jobs.append(Job(way, seed, (*own, *drawn, *given.overrides)))

    def say(outcome: Outcome) -> None:
        came = outcome.why if outcome.accuracy is None else f"{outcome.accuracy:.1%} in {outcome.seconds:.0f} s"
        print(f"{outcome.way}, seed {outcome.seed}: {came}", flush=True)

    shown = table(run_all(train, jobs, given.workers, say), teacher)
    recipe = load_recipe(RECIPE, given.overrides)
    about = (
        f"{recipe.train.max_steps} steps of {recipe.train.rows_per_step} rows at {recipe.train.learning_rate:g}, "
        f"{given.seeds} seeds; {' '.join(given.overrides) or 'the recipe as it is'}. Trained: at least {TRAINED:.0%} "
        "of the teacher's accuracy."
    )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "divergences.md").write_text(f"{shown}\n\n{about}\n", encoding="utf-8")
    print(f"\n{shown}\n\n{about} {time.monotonic() - began:.0f} s in all, with {given.workers} workers.")


if __name__ == "__main__":
    main()
