"""Kill stage one at random moments, again and again: is anything that was paid for lost, or asked for twice?

python benchmarks/kill_loop.py [--kills 25] [--seed 17] [--examples 180] [--latency 0.2] [--folder FOLDER]

A local server stands for the teacher and notes each request with the moment it came. `distill-llm generate-rationales`
asks it, several requests at once, and is killed (SIGKILL) at a random moment: four times of five while it asks, else at
any moment since it was started. After every fourth kill the journal's last line is torn at a random byte, as a power
cut would leave it. Then the command ends by itself, and all is compared with a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pyarrow import parquet

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is there, but not the one above it
from tests.servers import ModelServer  # noqa: E402

CONCURRENCY = 8
_START_SECONDS = 120.0


class Teacher:
    """Answers after a while, always the same to the same request, and notes who asked when.

    A request is known by the seed that it brings, which the toolkit derives from its key.
    """

    def __init__(self, latency: float):
        self.latency = latency
        self.came: list[tuple[int, float]] = []

    def __call__(self, body: dict[str, Any]) -> str:
        self.came.append((body["seed"], time.monotonic()))
        chance = random.Random(hashlib.sha256(f"{body['seed']} {body['prompt']}".encode()).digest())
        time.sleep(self.latency * chance.uniform(0.5, 1.5))
        first, _, rest = body["prompt"].partition(" buys ")
        second = rest.partition(" . ")[2].partition(" ")[0]
        words = f"{chance.randint(2, 40)} is to be compared with {chance.randint(2, 40)} ."
        return words if chance.random() < 0.05 else f"{words} so {chance.choice((first, second))}"


def seed_of(key: str) -> int:
    """As the teacher `openai_compatible` sends it."""
    return int(key, 16) % 2**31


@dataclass
class Report:
    """What the kills came to. ``kills``: where each met the run."""

    completions: int = 0
    sent: int = 0
    torn: int = 0
    seconds: float = 0.0
    kills: list[str] = field(default_factory=list)
    most_lost: int = 0


class Journal:
    """The file that is not to lose anything, read by this script alone."""

    def __init__(self, run: Path):
        self.path = run / "rationales" / "journal.jsonl"

    def whole(self) -> bytes:
        """All that was acknowledged: up to the last line end."""
        content = self.path.read_bytes() if self.path.exists() else b""
        return content[: content.rfind(b"\n") + 1]

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.whole().splitlines()]

    def tear(self, chance: random.Random) -> bool:
        """Cuts the last line at a random byte, its end at least."""
        whole = self.whole()
        if not whole:
            return False
        start = whole.rfind(b"\n", 0, len(whole) - 1) + 1
        os.truncate(self.path, chance.randrange(start, len(whole)))
        return True


def write_recipe(folder: Path, url: str, examples: int) -> Path:
    """Two samples of each example, and a hint where both are wrong, so that kills meet both rounds."""
    recipe = {
        "name": "killed",
        "run_dir": str(folder / "{name}"),
        "task": {"kind": "shop", "train_size": examples, "validation_size": 4, "test_size": 4},
        "rationales": {
            "teacher": {
                "kind": "openai_compatible",
                "model": "tiny",
                "base_url": url,
                "api": "completions",
                "concurrency": CONCURRENCY,
            },
            "sampling": {"temperature": 0.7, "max_new_tokens": 32},
            "samples": 2,
            "hint_retry": {"template": "{question}\n({answer})"},
            "keep": [{"kind": "parsable"}, {"kind": "dedupe"}],
        },
        "student": {"config": {"model_type": "t5"}, "tokenizer": {"kind": "words"}},
        "objective": [{"name": "label", "loss": {"kind": "cross_entropy"}, "targets": ["label"]}],
        "train": {"learning_rate": 0.01, "max_steps": 1},
        "evaluate": {"teacher": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def start(recipe: Path, run: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "distill_llm", "generate-rationales", str(recipe), f"run_dir={run}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (recipe.parent / "errors.txt").open("wb") as errors:
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors)


def finish(recipe: Path, run: Path) -> None:
    code = start(recipe, run).wait(600)
    assert code == 0, f"exit code {code}: {(recipe.parent / 'errors.txt').read_text(encoding='utf-8')}"


def kill_in_work(process: subprocess.Popen[bytes], teacher: Teacher, seconds: float) -> None:
    """So many seconds after the first request of this start, or when it was about to end by itself."""
    before, end = len(teacher.came), time.monotonic() + _START_SECONDS
    while len(teacher.came) == before and process.poll() is None:
        assert time.monotonic() < end, "nothing was asked"
        time.sleep(0.005)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()


def kill_again_and_again(
    recipe: Path, run: Path, teacher: Teacher, *, kills: int, seed: int, work_seconds: float
) -> Report:
    """Runs the recipe to its end with so many kills on the way. Asserts what must hold after each of them."""
    chance, journal, report = random.Random(seed), Journal(run), Report()
    began, startup = time.monotonic(), 0.0
    for number in range(kills):
        kept, arrived, started = journal.whole(), len(teacher.came), time.monotonic()
        process = start(recipe, run)
        if number % 5 == 4:
            time.sleep(chance.uniform(0, startup))
            process.kill()
        else:
            kill_in_work(process, teacher, chance.uniform(0, 1.6 * work_seconds / kills))
        code = process.wait()
        assert code == -9, f"it ended by itself ({code}) at kill {number + 1}: give it more --examples or --latency"
        came = teacher.came[arrived:]
        if came:
            startup = came[0][1] - started
        now = journal.whole()
        assert now.startswith(kept), f"kill {number + 1}: lines that were acknowledged before are gone"
        written = now[len(kept) :].count(b"\n")
        report.most_lost = max(report.most_lost, len(came) - written)
        report.kills.append(f"asked {len(came)}, journaled {written}" if came else "not asking yet")
        print(f"kill {number + 1}, {time.monotonic() - began:.0f} s: {report.kills[-1]}", file=sys.stderr, flush=True)
        ask_nothing_again(kept, came, number)
        if number % 4 == 3:
            report.torn += journal.tear(chance)
    kept, arrived = journal.whole(), len(teacher.came)
    finish(recipe, run)
    ask_nothing_again(kept, teacher.came[arrived:], kills)
    assert journal.whole().startswith(kept)
    report.seconds = time.monotonic() - began
    report.completions, report.sent = len(journal.entries()), len(teacher.came)
    return report


def ask_nothing_again(kept: bytes, came: list[tuple[int, float]], number: int) -> None:
    """Of what was journaled before a start, nothing reaches the server after it; and nothing twice in one start."""
    seeds = [seed for seed, _ in came]
    paid = {seed_of(json.loads(line)["key"]) for line in kept.splitlines()}
    again = paid & set(seeds)
    assert not again, f"start {number + 1}: {len(again)} requests were sent again although the journal has them"
    assert len(seeds) == len(set(seeds)), f"start {number + 1}: a request was sent twice"


def compare(killed: Path, whole: Path, torn: int) -> None:
    """The same completions, each once; the same data set; and a ledger that knows of each, with what was torn."""
    found, wanted = Journal(killed).entries(), Journal(whole).entries()
    keys = [entry["key"] for entry in found]
    assert len(keys) == len(set(keys)), "a completion is in the journal twice"
    texts = [{entry["key"]: entry["text"] for entry in entries} for entries in (found, wanted)]
    assert texts[0] == texts[1], "the journals hold other completions"
    tables = [parquet.read_table(run / "rationales" / "train.parquet") for run in (killed, whole)]
    assert tables[0].num_rows == len(keys)
    assert tables[0].equals(tables[1]), "the data sets differ"
    total = json.loads((killed / "rationales" / "spent.json").read_text(encoding="utf-8"))["total"]
    spent = total["completions"]  # what was torn off the journal has been paid for all the same
    assert len(keys) <= spent <= len(keys) + torn, f"the ledger has {spent} completions of {len(keys)}, {torn} torn"
    tokens = sum(entry["tokens_out"] for entry in found)
    most = torn * max(entry["tokens_out"] for entry in found)
    assert tokens <= total["tokens_out"] <= tokens + most, f"the ledger has {total['tokens_out']} tokens of {tokens}"
    assert not list(killed.rglob("*.part")), "a draft of a file was left behind"


def measure(folder: Path, *, kills: int, seed: int, examples: int, latency: float) -> Report:
    """A run that nobody disturbs, then the killed one. Asserts all that must hold."""
    teacher = Teacher(latency=0.0)
    with ModelServer(teacher) as server:
        recipe = write_recipe(folder, server.url, examples)
        finish(recipe, folder / "whole")
        sent = len(teacher.came)
        assert len({number for number, _ in teacher.came}) == sent, "two requests have one seed: choose another recipe"
        assert sent > 2 * examples, "no example needed a hint"
        teacher.came, teacher.latency = [], latency
        work_seconds = sent * latency / CONCURRENCY
        report = kill_again_and_again(
            recipe, folder / "killed", teacher, kills=kills, seed=seed, work_seconds=work_seconds
        )
    compare(folder / "killed", folder / "whole", report.torn)
    lost = report.sent - report.completions
    assert lost <= kills * CONCURRENCY + report.torn, f"{lost} requests were sent twice, more than were in flight"
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--examples", type=int, default=180)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds for one answer, on average")
    parser.add_argument("--folder", type=Path, default=None, help="where temporary files go")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        report = measure(
            Path(place), kills=given.kills, seed=given.seed, examples=given.examples, latency=given.latency
        )
    in_work = sum(met != "not asking yet" for met in report.kills)
    print(
        f"seed {given.seed}: {given.kills} kills, {in_work} of them while it asked, {report.torn} torn lines, "
        f"{report.seconds:.0f} s.\n{report.completions} completions, each journaled once; {report.sent} requests sent: "
        f"{report.sent - report.completions} were in flight at a kill or in a torn line, at most {report.most_lost} a "
        "kill. Nothing journaled was asked again; the data set is that of a run that nobody disturbed."
    )


if __name__ == "__main__":
    main()
