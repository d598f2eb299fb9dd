"""Every scheme against direct distillation, on the quickstart's questions: same student, same steps, several seeds.

    python benchmarks/schemes.py [KEY=VALUE]... [--seeds 5] [--workers 2] [--only WAY ...] [--out FOLDER]

Needs the quickstart's teacher (``distill-llm run recipes/quickstart/teacher.yaml``). Each seed draws other initial
weights, another order and another pool of questions, the same for all schemes; direct distillation is always run. The
interval is that of the mean of the paired differences to it (Student's t over seeds). A scheme with stages takes the
steps of all of them: the column says how many times a plain training's. Resumes; writes OUT/schemes.md and
OUT/schemes.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from divergences import read_options, run_all

from distill_llm.core.errors import DistillError
from distill_llm.core.files import read_json, write_json
from distill_llm.recipe.load import load_recipe

RECIPE = Path(__file__).with_suffix(".yaml")
DIRECT = "direct distillation"

LABEL = {"name": "label", "loss": {"kind": "cross_entropy"}, "targets": ["label"]}
RATIONALE = {"name": "rationale", "loss": {"kind": "cross_entropy"}, "targets": ["rationale"]}
BOTH = ["label", "rationale"]
HINT = {"name": "hint", "loss": {"kind": "hint", "layers": "uniform"}, "targets": BOTH, "teacher": "big"}
ASSISTANTS = [
    {"name": "large", "config": {"d_model": 72, "d_kv": 18, "d_ff": 128}},
    {"name": "middle", "config": {"d_model": 48, "d_kv": 12, "d_ff": 80}},
]


def soft(teacher: str = "big", **changes: Any) -> dict[str, Any]:
    loss = {"kind": "forward_kl", "temperature": 2.0}
    return {"name": f"soft_{teacher}", "loss": loss, "targets": BOTH, "teacher": teacher} | changes


def chain(guidance: str, **more: Any) -> list[str]:
    return [scheme(kind="assistant_chain", teacher="big", guidance=guidance, assistants=ASSISTANTS, **more)]


def scheme(**keys: Any) -> str:
    """The override that sets the recipe's scheme."""
    return f"scheme={json.dumps(keys)}"


def objective(*terms: dict[str, Any]) -> str:
    """The override that sets the recipe's objective."""
    return f"objective={json.dumps(terms)}"


BORN_AGAIN = {"kind": "born_again", "generations": 3, "terms": [soft("previous")]}
WAYS: dict[str, list[str]] = {
    "labels alone": [objective(LABEL)],
    "step by step (labels and rationales)": [objective(LABEL, RATIONALE)],
    DIRECT: [],
    "soft labels alone": [objective(soft())],
    "soft labels until half": [objective(LABEL, RATIONALE, soft(until=0.5))],
    "hints beside it": [objective(LABEL, RATIONALE, soft(), HINT)],
    "hints first": [objective(LABEL, RATIONALE, soft(), HINT), scheme(kind="hint_first", share_of_steps=0.2)],
    "own average (EMA) beside it": [
        'teachers.own={"kind": "ema", "decay": 0.99}',
        objective(LABEL, RATIONALE, soft(), soft("own", weight={"start": 0.0, "end": 1.0, "over": 0.5})),
    ],
    "chain, nearest": chain("nearest"),
    "chain, dense": chain("dense"),
    "chain, dense with dropping": chain("dense", drop=0.25),
    "chain, ensemble": chain("ensemble"),
    "born again, 3 generations": [objective(LABEL, RATIONALE), f"scheme={json.dumps(BORN_AGAIN)}"],
    "mutual, 2 peers": [scheme(kind="mutual", peers=2), objective(LABEL, RATIONALE, soft("peers"))],
    "mutual, 2 peers, beside the teacher": [
        scheme(kind="mutual", peers=2),
        objective(LABEL, RATIONALE, soft(), soft("peers")),
    ],
    "self-distillation, exit 1": [
        scheme(kind="self_distill", exits=[1]),
        objective(LABEL, RATIONALE, soft(), soft("deepest")),
    ],
    "on-policy": [
        scheme(kind="on_policy", student_fraction={"start": 0.0, "end": 0.5, "over": 0.5}, max_new_tokens=32)
    ],
}


@dataclass(frozen=True)
class Job:
    way: str
    seed: int
    overrides: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """``scores``: accuracy of every model that was trained; None where the recipe was refused, and ``why`` says so."""

    way: str
    seed: int
    scores: dict[str, float] | None
    steps: float
    seconds: float
    why: str = ""


def train(job: Job) -> Outcome:
    """Runs in a process of its own; what an earlier run came to is read."""
    import distill_llm

    done = job.folder / "outcome.json"
    if done.exists():
        return Outcome(job.way, job.seed, **read_json(done))
    began = time.monotonic()
    try:
        recipe = load_recipe(RECIPE, job.overrides)
        card = distill_llm.run(recipe)
    except DistillError as error:
        return Outcome(job.way, job.seed, None, 0.0, 0.0, " ".join(str(error).split())[:160])
    steps = sum(stage.share_of_steps for stage in recipe.stages)
    scores = {entry.name: entry.accuracy for entry in card.entries}
    facts: dict[str, Any] = {"scores": scores, "steps": steps, "seconds": round(time.monotonic() - began, 1)}
    write_json(done, facts)
    return Outcome(job.way, job.seed, **facts)


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row for each way, in the order of the outcomes; then the models beside the students."""
    direct = {one.seed: one.scores["student"] for one in outcomes if one.way == DIRECT and one.scores}
    lines = [
        "| scheme | accuracy %, mean ± sd | minus direct, points [95% interval] | x the steps | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    others = ["", "| model on the way, or beside | accuracy %, mean ± sd |", "|---|---:|"]
    for way in dict.fromkeys(one.way for one in outcomes):
        own = [one for one in outcomes if one.way == way and one.scores is not None]
        if not own:
            why = next(one.why for one in outcomes if one.way == way)
            lines.append(f"| {way} | left out: {why} | | | |")
            continue
        by_seed = {one.seed: one.scores["student"] for one in own if one.scores}
        gaps = [score - direct[seed] for seed, score in by_seed.items() if seed in direct]
        lines.append(
            f"| {way} | {spread(list(by_seed.values()))} | {'' if way == DIRECT else paired_interval(gaps)} | "
            f"{own[0].steps:g} | {mean(one.seconds for one in own):.0f} |"
        )
        for name in sorted({name for one in own for name in one.scores or {}} - {"student"}):
            scores = [one.scores[name] for one in own if one.scores and name in one.scores]
            others.append(f"| {way}: {name} | {spread(scores)} |")
    return "\n".join([*lines, *(others if len(others) > 3 else [])])


def spread(shares: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds, in percent."""
    return f"{100 * mean(shares):.1f}" + (f" ± {100 * stdev(shares):.1f}" if len(shares) > 1 else "")


def paired_interval(gaps: Sequence[float]) -> str:
    """The mean of the seeds' differences, in points, with the 95% interval of Student's t."""
    if len(gaps) < 2:
        return "".join(f"{100 * gap:+.1f}" for gap in gaps)
    from scipy.stats import t

    half = float(t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / len(gaps) ** 0.5
    middle = mean(gaps)
    return f"{100 * middle:+.1f} [{100 * (middle - half):+.1f}, {100 * (middle + half):+.1f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    given = read_options(arguments, __doc__, seeds=5, out="runs/schemes")
    began = time.monotonic()
    jobs = []
    for seed in range(1, given.seeds + 1):
        for way, own in WAYS.items():
            if given.only and way not in (*given.only, DIRECT):
                continue
            folder = given.out / f"{''.join(one if one.isalnum() else '-' for one in way)}-{seed}"
            drawn = [f"seed={seed}", f"task.train_stream={100 + seed}", f"run_dir={folder}"]
            jobs.append(Job(way, seed, (*own, *drawn, *given.overrides), folder))

    def say(outcome: Outcome) -> None:
        came = outcome.why if outcome.scores is None else f"{outcome.scores['student']:.1%} in {outcome.seconds:.0f} s"
        print(f"{outcome.way}, seed {outcome.seed}: {came}", flush=True)

    outcomes = run_all(train, jobs, given.workers, say)
    shown = table(outcomes)
    recipe = load_recipe(RECIPE, given.overrides)
    about = (
        f"{recipe.train.max_steps} steps of {recipe.train.rows_per_step} rows at {recipe.train.learning_rate:g}, "
        f"untuned; {given.seeds} seeds; {' '.join(given.overrides) or 'the recipe as it is'}."
    )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "schemes.md").write_text(f"{shown}\n\n{about}\n", encoding="utf-8")
    write_json(given.out / "schemes.json", {f"{one.way}, seed {one.seed}": one.scores for one in outcomes})
    print(f"\n{shown}\n\n{about} {time.monotonic() - began:.0f} s in all, with {given.workers} workers.")


if __name__ == "__main__":
    main()
