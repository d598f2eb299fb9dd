"""Examples per second of this trainer against the paper's way of training, and what soft labels add to a step.

    python benchmarks/training.py [KEY=VALUE]... [--rounds 5] [--ours bf16 train.precision=bfloat16]...

One run of all ways on the same rows, in turn: block after block of steps, each on freshly drawn weights, round after
round. A ratio is taken within a round; shown are the median over the rounds and the range.

The baseline is the training of Hsieh et al. 2023 (arXiv:2305.02301) on a plain Hugging Face trainer: batches of a fixed
number of shuffled examples, each padded to its longest row, forwarded twice (label with `predict: `, rationale with
`explain: `), with the models' own mean losses, alpha * label + (1 - alpha) * rationale, in float32. Rows, lengths,
threads, optimiser, schedule and clipping are the same for all. Nobody validates or writes checkpoints; one step of each
block is logged, ours with its diagnostics. The soft labels' teacher is twice as wide as the student. All is done on a
GPU where there is one (CUDA_VISIBLE_DEVICES="" hides it), and the baseline there in bfloat16 too.

`--ours NAME KEY=VALUE ...` adds one more way of ours with these overrides of benchmarks/training.yaml; KEY=VALUE before
all options are overrides for everybody.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from paper_trainer import paper_trainer
from transformers import Trainer, TrainerCallback, set_seed

import distill_llm
from distill_llm.core.quiet import quiet_libraries
from distill_llm.data.rows import Row
from distill_llm.models.load import build_student, read_tokenizer
from distill_llm.models.spec import StudentSpec
from distill_llm.pipeline.rationale_stage import Material, load_examples, read_material
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.student_stage import Plan, make_plan, make_trial
from distill_llm.pipeline.trial import make_trial_trainer
from distill_llm.recipe.load import load_recipe
from distill_llm.recipe.recipe import Recipe

RECIPE = Path(__file__).with_suffix(".yaml")
ROUGH_BASELINE = "baseline in bfloat16"
BASELINE, OURS, ONLINE, CACHED = "baseline", "ours", "online soft labels", "cached soft labels"
FASTER, CACHED_COST, ONLINE_COST = 2.5, 1.15, 1.1  # what is aimed at
WIDER = ("d_model", "d_ff", "num_heads")  # in the teacher, twice
TOP_K = 32
LAST = 10  # steps whose mean loss says where a training ended


@dataclass(frozen=True)
class Way:
    """One recipe, up to the point where its student is trained."""

    name: str
    overrides: tuple[str, ...]
    recipe: Recipe
    run: RunFolder
    material: Material
    plan: Plan

    @property
    def rows(self) -> list[Row]:
        return self.plan.arms[0].rows_of(self.plan.rows.rows)


def prepare(name: str, overrides: Sequence[str], folder: Path) -> Way:
    """Reads the texts, trains the tokenizer, makes the rows."""
    recipe = load_recipe(RECIPE, [*overrides, f"run_dir={folder / name.replace(' ', '-')}"])
    run = distill_llm.generate_rationales(recipe)
    material = read_material(recipe, load_examples(recipe), run)
    assert material is not None
    return Way(name, tuple(overrides), recipe, run, material, make_plan(recipe, material, run))


class Steps(TrainerCallback):
    """When the steps of these numbers ended, a GPU's work included, and what was logged."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, numbers: Sequence[int] = ()) -> None:
        self._clock, self._numbers = clock, numbers
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step in self._numbers:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # at the ends of a block alone: in between steps overlap as they do elsewhere
            self.ends.append(self._clock())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def our_trainer(way: Way, *, steps: int, seed: int, log_every: int) -> Trainer:
    """The trainer that `distill-llm train` would use, but for validation and checkpoints."""
    trial = make_trial(way.recipe, way.material, way.plan, way.run, way.plan.arms[0], way.recipe.train.learning_rate)
    trial = replace(
        trial,
        recipe=way.recipe.model_copy(update={"seed": seed}),
        arm=replace(trial.arm, max_steps=steps),
        validation=(),
    )
    trainer = make_trial_trainer(trial)
    trainer.args.save_strategy = "no"
    trainer.args.logging_steps = log_every
    return trainer


def baseline_trainer(
    way: Way, *, steps: int, seed: int, log_every: int, batches: Sequence[Sequence[int]] | None = None
) -> Trainer:
    """The paper's, on the rows of ``way``; ``batches`` says which examples each step sees."""
    set_seed(seed)
    return paper_trainer(
        build_student(way.recipe.student, _tokenizer(way)),
        way.rows,
        way.recipe,
        steps=steps,
        seed=seed,
        log_every=log_every,
        folder=way.run.root / "baseline",
        batches=batches,
    )


def in_bfloat16(way: Way) -> Way:
    train = way.recipe.train.model_copy(update={"precision": "bfloat16"})
    return replace(way, recipe=way.recipe.model_copy(update={"train": train}))


def seconds_a_step(make: Callable[..., Trainer], way: Way, given: argparse.Namespace, seed: int) -> float:
    """Mean over a block, from the end of its warm-up on: batches, forward, backward, optimiser, logs."""
    last = given.warmup + given.steps
    clock = Steps(time.process_time if given.clock == "cpu" else time.perf_counter, (given.warmup, last))
    trainer = make(way, steps=last, seed=seed, log_every=given.steps)
    trainer.add_callback(clock)
    trainer.train()
    return (clock.ends[1] - clock.ends[0]) / given.steps


def time_all(ways: dict[str, tuple[Callable[..., Trainer], Way]], given: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step, one number a round and way. What runs first pays for cold caches: that block is not counted."""
    first = next(iter(ways.values()))
    seconds_a_step(*first, given, seed=0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(given.rounds):
        for name, (make, way) in ways.items():
            seconds[name].append(seconds_a_step(make, way, given, seed=1 + number))
            print(f"round {number + 1}: {name}: {seconds[name][-1]:.4g} s a step", file=sys.stderr, flush=True)
    return seconds


def make_teacher(student: Way, folder: Path) -> tuple[Path, int]:
    """A T5 with random weights and the student's words: what it says costs as much as sense; and its size."""
    place, sizes = folder / "teacher", dict[str, Any](student.recipe.student.config)
    spec = StudentSpec.model_validate(
        {"config": sizes | {key: 2 * sizes[key] for key in WIDER}, "tokenizer": str(student.run.tokenizer)}
    )
    torch.manual_seed(0)
    made = build_student(spec, _tokenizer(student))
    made.model.save_pretrained(place)
    made.tokenizer.save_pretrained(place)
    return place, made.num_parameters


def with_soft_labels(way: Way, teacher: Path, dtype: str, *, cached: bool) -> list[str]:
    """Overrides that add a soft label to each of the recipe's terms."""
    hard = [term.model_dump(mode="json") for term in way.recipe.objective]
    soft = [
        {"name": f"soft_{t}", "loss": {"kind": "forward_kl"}, "targets": [t], "teacher": "soft" if cached else "big"}
        for t in ("label", "rationale")
    ]
    teachers: dict[str, Any] = {"big": {"kind": "frozen", "model": str(teacher), "dtype": dtype}}
    if cached:
        teachers["soft"] = {"kind": "cached", "of": "big", "payload": {"kind": "top_k", "k": TOP_K}}
    named = [f"objective={json.dumps([*hard, *soft])}", f"teachers={json.dumps(teachers)}"]
    return [*way.overrides, *named, f"student.tokenizer={way.run.tokenizer}"]


def fill_cache(way: Way) -> float:
    """Seconds that `distill-llm cache-signals` took."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "distill_llm", "cache-signals", str(way.run.recipe)], check=True)
    return time.perf_counter() - began


def compare_losses(way: Way, plain: Way, steps: int) -> tuple[float, float, float]:
    """The largest relative difference of the logged losses, and what both end at: same weights, examples and steps.

    The baseline learns the rows of ``plain``: those of ``way`` may be laid out otherwise.
    """
    ours = our_trainer(way, steps=steps, seed=1, log_every=1)
    cuts: Any = ours.step_sampler  # pyright: ignore[reportAttributeAccessIssue]
    rows, cut = way.rows, [list(indices) for indices in cuts]
    batches = []
    for start in range(0, len(cut), cuts.micro_batches):
        step = [rows[index].example for indices in cut[start : start + cuts.micro_batches] for index in indices]
        batches.append(sorted(set(step)))
        assert len(step) == 2 * len(batches[-1]), "a step has both rows of each of its examples"
    theirs = baseline_trainer(plain, steps=steps, seed=1, log_every=1, batches=batches)
    models: Any = (ours.model, theirs.model)
    models[1].load_state_dict(models[0].state_dict())
    logged = []
    for trainer in (ours, theirs):
        trainer.add_callback(log := Steps())
        trainer.train()
        logged.append(log.losses)
    assert [len(losses) for losses in logged] == [steps, steps]
    ends = [mean(losses[-LAST:]) for losses in logged]
    return max(abs(a - b) / b for a, b in zip(*logged, strict=True)), ends[0], ends[1]


def report_speed(seconds: dict[str, list[float]], examples: int) -> None:
    print("\n| (a) way | seconds a step | examples/s | faster than the baseline by (range) | target |")
    print("|---|---:|---:|---:|---|")
    for name, spent in seconds.items():
        if name in (ONLINE, CACHED):
            continue
        ratios = [theirs / own for theirs, own in zip(seconds[BASELINE], spent, strict=True)]
        lead = "| | |" if name == BASELINE else f"| {spread(ratios)} | {verdict(median(ratios) >= FASTER, FASTER)} |"
        print(f"| {name} | {median(spent):.4g} | {examples / median(spent):.1f} {lead}")


def report_soft(seconds: dict[str, list[float]], on: str, limits: dict[str, float], skipped: str) -> None:
    print(f"\n| (b), (c) way | seconds a step | times a step of `{on}` (range) | target |\n|---|---:|---:|---|")
    for name, limit in limits.items():
        ratios = [own / without for own, without in zip(seconds[name], seconds[on], strict=True)]
        met = verdict(median(ratios) <= limit, limit)
        print(f"| {name} | {median(seconds[name]):.4g} | {spread(ratios)} | {met} |")
    if skipped:
        print(f"| {CACHED} | skipped: {skipped} | | |")


def spread(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"


def verdict(met: bool, limit: float) -> str:
    return f"{limit:.2f}: {'met' if met else 'not met'}"


def why_no_cache() -> str:
    there = importlib.util.find_spec("distill_llm.teachers.cached") is not None
    return "" if there else "this version has no teacher of kind `cached`"


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe, for all ways")
    parser.add_argument("--ours", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"))
    parser.add_argument("--soft-on", default=OURS, metavar="NAME", help="the way of ours that soft labels are added to")
    parser.add_argument("--teacher-dtype", default="auto", help="of the soft labels' teacher; auto: float32")
    parser.add_argument("--parts", nargs="+", choices=["a", "b", "c", "d"], default=["a", "b", "c", "d"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="timed in each block")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--equal-steps", type=int, default=50, help="of the comparison of losses")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: this process's, of all threads")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    given = read_options(arguments)
    data = load_recipe(RECIPE, given.overrides).task
    if data.model_dump().get("kind") == "cqa" and not Path(str(data.model_dump()["data"])).is_dir():
        sys.exit(f"skipped: {data.model_dump()['data']} is not there; say where: task.data=DIR and rationales.teacher")
    quiet_libraries()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as place:
        measure(given, Path(place))


def measure(given: argparse.Namespace, folder: Path) -> None:
    own = {OURS: prepare(OURS, given.overrides, folder)}
    for name, *overrides in given.ours:
        own[name] = prepare(name, [*given.overrides, *overrides], folder)
    if given.soft_on not in own:
        sys.exit(f"--soft-on {given.soft_on}: expected one of {sorted(own)}")
    describe(own, given)
    timed: dict[str, tuple[Callable[..., Trainer], Way]] = {}
    if "a" in given.parts:
        timed[BASELINE] = (baseline_trainer, own[OURS])
        if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
            timed[ROUGH_BASELINE] = (baseline_trainer, in_bfloat16(own[OURS]))
    timed |= {name: (our_trainer, way) for name, way in own.items() if "a" in given.parts or name == given.soft_on}
    soft, limits, skipped = add_soft_labels(own[given.soft_on], given, folder)
    timed |= {name: (our_trainer, way) for name, way in soft.items()}
    if {"a", "b", "c"} & set(given.parts):
        seconds = time_all(timed, given)
        if "a" in given.parts:
            report_speed(seconds, own[OURS].recipe.train.rows_per_step // 2)
        if {"b", "c"} & set(given.parts):
            report_soft(seconds, given.soft_on, limits, skipped)
    if "d" in given.parts:
        report_equality(given, folder)


def report_equality(given: argparse.Namespace, folder: Path) -> None:
    """A way whose overrides change what is computed (precision, where a prefix stands) can only end about there."""
    last = min(LAST, given.equal_steps)
    print(
        f"\n| (d) way, {given.equal_steps} steps | mean loss of the last {last} | of the baseline | "
        "largest relative difference of a step |"
    )
    print("|---|---:|---:|---:|")
    still = [*given.overrides, "student.config.dropout_rate=0"]
    plain = prepare(f"{OURS} equal", still, folder)
    for name, *overrides in [[OURS], *given.ours]:
        words = f"student.tokenizer={plain.run.tokenizer}"
        way = plain if name == OURS else prepare(f"{name} equal", [*still, *overrides, words], folder)
        largest, ends, theirs = compare_losses(way, plain, given.equal_steps)
        print(f"| {name} | {ends:.6f} | {theirs:.6f} | {largest:.1e} |", flush=True)


def add_soft_labels(base: Way, given: argparse.Namespace, folder: Path) -> tuple[dict[str, Way], dict[str, float], str]:
    """The ways with soft labels, the most that each may cost, and why one is left out."""
    soft: dict[str, Way] = {}
    limits: dict[str, float] = {}
    if not {"b", "c"} & set(given.parts):
        return soft, limits, ""
    teacher, size = make_teacher(base, folder)
    weights = build_student(base.recipe.student, _tokenizer(base)).num_parameters
    print(f"Teacher of soft labels: Nt = {size:,} parameters; student: Ns = {weights:,}.")
    if "c" in given.parts:
        soft[ONLINE] = prepare(ONLINE, with_soft_labels(base, teacher, given.teacher_dtype, cached=False), folder)
        limits[ONLINE] = ONLINE_COST * (1 + size / (3 * weights))
    skipped = why_no_cache() if "b" in given.parts else ""
    if "b" in given.parts and not skipped:
        soft[CACHED] = prepare(CACHED, with_soft_labels(base, teacher, given.teacher_dtype, cached=True), folder)
        limits[CACHED] = CACHED_COST
        print(f"Cache of the top {TOP_K}: written in {fill_cache(soft[CACHED]):.0f} s.")
    return soft, limits, skipped


def describe(own: dict[str, Way], given: argparse.Namespace) -> None:
    """What was measured, and with which settings."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    rows = own[OURS].rows
    means = {
        target: [sum(map(len, ids)) / len(ids) for ids in _ids_of(rows, target)] for target in ("label", "rationale")
    }
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{given.threads} threads"
    print(f"python {platform.python_version()}, {versions}, {place}; {len(rows):,} rows.")
    for target, (inputs, labels) in means.items():
        print(f"Mean tokens of a {target} row: {inputs:.1f} in, {labels:.1f} out.")
    print(
        f"{given.rounds} rounds of {given.steps} steps a way, each after {given.warmup} that are not timed; "
        f"{given.clock} time."
    )
    for name, way in own.items():
        spec = way.recipe.train
        cut = f"{spec.tokens_per_batch} tokens" if spec.tokens_per_batch else f"{spec.rows_per_batch} rows"
        said = " ".join(way.overrides) or "the recipe as it is"
        print(f"{name}: {spec.rows_per_step} rows a step in micro-batches of {cut}, {spec.precision}; {said}")


def _ids_of(rows: Sequence[Row], target: str) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    own = [row for row in rows if row.target == target]
    return [row.input_ids for row in own], [row.label_ids for row in own]


def _tokenizer(way: Way) -> Any:
    return read_tokenizer(str(way.run.tokenizer), where="student.tokenizer")


if __name__ == "__main__":
    main()
