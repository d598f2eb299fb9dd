"""The rationale stage at its own cost: short fake completions through journal, vote, keep and Parquet.

python benchmarks/rationale_rows.py [--rows 10000 100000 1000000] [--samples 1 4] [--folder FOLDER]

The teacher is `replay`, so that what is measured is all but a model: reading the data, keys, journal, parsing, votes,
rules, Parquet. Each size runs in a fresh process, for a process's memory only grows; the files are deleted after it.
What came out is compared with what the fake completions were made to give. 1.2 GB of disk at most.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MAX_MIB = 1536
MAX_RATIO = 1.25
HEAVY = ("torch", "transformers", "datasets", "pandas")
RULES: tuple[dict[str, Any], ...] = (
    {"kind": "parsable"},
    {"kind": "majority"},
    {"kind": "min_agreement", "share": 0.5},
    {"kind": "dedupe"},
    {"kind": "shortest"},
)


def question(number: int) -> tuple[str, int]:
    """A question that no other number has, and its answer."""
    first, second = number % 977, number % 1009
    return f"Shelf {number}: how many tins are {first} tins and {second} tins?", first + second


def completions(number: int, samples: int) -> list[str]:
    """Most are right; one of a hundred states no answer, one of fifty a wrong one; every fourth repeats the first."""
    first, second = number % 977, number % 1009
    texts = []
    for sample in range(samples):
        answer = first + second + (7 if (number * samples + sample) % 50 == 3 else 0)
        words = "" if sample % 4 == 3 else " and so" * sample
        text = f"There are {first} tins on it. Then come {second} more{words}. {first} + {second} = {answer}."
        unreadable = (number * samples + sample) % 100 == 11
        texts.append(text if unreadable else f"{text} The answer is {answer}.")
    return texts


def write_data(folder: Path, examples: int, samples: int) -> None:
    """Questions of three splits and completions of one, line by line: what this process holds, its children inherit."""
    folder.mkdir(exist_ok=True)
    splits = {"train": range(examples), "validation": range(-2, 0), "test": range(-4, -2)}
    for split, numbers in splits.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number in numbers:
                text, answer = question(number)
                file.write(json.dumps({"id": f"shelf-{number}", "question": text, "label": str(answer)}) + "\n")
    with (folder / "completions.jsonl").open("w", encoding="utf-8") as file:
        for number in range(examples):
            file.write(json.dumps({"text": completions(number, samples)}) + "\n")


def make_recipe(folder: Path, samples: int) -> Any:
    """Parsing it loads no heavy package either."""
    from distill_llm.recipe.recipe import Recipe

    return Recipe.model_validate(
        {
            "name": "rows",
            "run_dir": str(folder / "run"),
            "task": {
                "kind": "jsonl",
                "data": str(folder / "train.jsonl"),
                "validation_data": str(folder / "validation.jsonl"),
                "test_data": str(folder / "test.jsonl"),
                "fields": {"input": "question", "label": "label", "id": "id"},
            },
            "rationales": {
                "teacher": {"kind": "replay", "files": {"train": str(folder / "completions.jsonl")}},
                "samples": samples,
                "keep": RULES,
            },
            "student": {"config": {"model_type": "t5"}, "tokenizer": {"kind": "words"}},
            "objective": [{"name": "label", "loss": {"kind": "cross_entropy"}, "targets": ["label"]}],
            "train": {"learning_rate": 0.01, "max_steps": 1},
            "evaluate": {"teacher": False},
        }
    )


class Laps:
    """A progress that only notes when each stage was last heard of."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def advance(self, name: str, done: float, total: float, note: str = "") -> None:
        self.last[name] = time.perf_counter()

    def say(self, message: str) -> None:
        self.last["loaded"] = time.perf_counter()


def measure(folder: Path, examples: int, samples: int) -> dict[str, Any]:
    """One run of the stage in this process: seconds in all and of its parts, peak memory, what was written.

    A small run goes before it, so that imports are not in the seconds; what they take of the memory is ``base``.
    """
    from distill_llm.core.files import read_json
    from distill_llm.pipeline.run import generate_rationales

    small = folder / "small"
    write_data(small, 100, samples)
    generate_rationales(make_recipe(small, samples))
    base = peak_mib()
    recipe, laps, began, worked = make_recipe(folder, samples), Laps(), time.perf_counter(), time.process_time()
    run = generate_rationales(recipe, progress=laps)
    ended, worked = time.perf_counter(), time.process_time() - worked
    peak = peak_mib()
    check(read_json(run.funnel)["train"], examples, samples)
    asked = laps.last["rationales, train"]
    return {
        "seconds": ended - began,
        "cpu": worked,
        "load": laps.last["loaded"] - began,
        "ask": asked - laps.last["loaded"],
        "write": ended - asked,
        "base": base,
        "peak": peak,
        "journal": run.journal().stat().st_size / 2**20,
        "parquet": run.rationales("train").stat().st_size / 2**20,
        "heavy": sorted(name for name in HEAVY if name in sys.modules),
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def check(funnel: dict[str, Any], examples: int, samples: int) -> None:
    """What the rules must have kept, counted here without the package."""
    wanted = Counter[str]()
    for number in range(examples):
        _, right = question(number)
        texts = completions(number, samples)
        votes = Counter(text.rpartition(" The answer is ")[2] for text in texts if "The answer is" in text)
        top = max(votes.values(), default=0)
        wanted["completed"] += samples
        wanted["parsed"] += votes.total()
        wanted["agreed"] += votes[f"{right}."]
        wanted["kept"] += top / samples >= 0.5  # `shortest` leaves one of those that reach the vote
    found = {name: funnel[name] for name in wanted}
    assert found == dict(wanted), f"the funnel has {found}, expected {dict(wanted)}"


def run_fresh(folder: Path, examples: int, samples: int) -> dict[str, Any]:
    """The same in a process of its own."""
    words = [sys.executable, __file__, "--only", str(examples), str(samples), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def sizes(rows: list[int], samples: list[int]) -> Iterator[tuple[int, int]]:
    for each in samples:
        for number in rows:
            yield number // each, each


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--folder", type=Path, default=None, help="where temporary files go")
    parser.add_argument("--only", nargs=3, metavar=("EXAMPLES", "SAMPLES", "FOLDER"), help="one size in this process")
    given = parser.parse_args()
    if given.only:
        examples, each, place = given.only
        print(json.dumps(measure(Path(place), int(examples), int(each))))
        return
    columns = ("examples x samples", "rows", "seconds", "CPU s", "load s", "ask s", "write s", "us/row", "CPU us/row")
    table = Table(*columns, "x size before", "base MiB", "peak MiB", "journal MiB", "Parquet MiB", box=None)
    problems, before, heavy = [], {}, set()
    for examples, each in sizes(given.rows, given.samples):
        rows = examples * each
        with tempfile.TemporaryDirectory(dir=given.folder) as place:
            write_data(Path(place), examples, each)
            found = run_fresh(Path(place), examples, each)
        cpu = found["cpu"] / rows * 1e6
        ratio = cpu / before[each] if each in before else None
        before[each] = cpu
        heavy |= set(found["heavy"])
        numbers = [f"{found[name]:.1f}" for name in ("seconds", "cpu", "load", "ask", "write")]
        numbers += [f"{found['seconds'] / rows * 1e6:.1f}", f"{cpu:.1f}", f"{ratio:.2f}" if ratio else ""]
        numbers += [f"{found[name]:,.1f}" for name in ("base", "peak", "journal", "parquet")]
        table.add_row(f"{examples:,} x {each}", f"{rows:,}", *numbers)
        print(f"{examples:,} x {each}: {found}", file=sys.stderr)
        if found["peak"] > MAX_MIB:
            problems.append(f"{rows:,} rows: {found['peak']:,.0f} MiB, more than {MAX_MIB:,}")
        if ratio and ratio > MAX_RATIO:
            problems.append(f"{rows:,} rows: {ratio:.2f} times as long a row as the size before: not linear")
    Console(width=180).print(table)
    print(f"of {', '.join(HEAVY)}, loaded in the measured processes: {', '.join(sorted(heavy)) or 'none'}")
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
