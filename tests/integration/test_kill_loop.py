"""Stage one is killed at random moments: nothing that was paid for is lost, nothing is asked for twice.

benchmarks/kill_loop.py does the same more often and tells what it met.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pyarrow import parquet

from tests.servers import ModelServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # many starts of the command, each of seconds
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kill_loop.py"


@pytest.fixture(scope="module")
def kill_loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_loop", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_loop"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_whatever_moment_it_is_killed_at_each_completion_is_paid_for_and_kept_once(
    kill_loop: ModuleType, tmp_path: Path
) -> None:
    """The script asserts what must hold after each kill and in the end; here, that the kills met what they should."""
    report = kill_loop.measure(tmp_path, kills=6, seed=17, examples=90, latency=0.2)
    assert len(report.kills) == 6
    assert sum(met.startswith("asked") for met in report.kills) >= 4
    assert report.torn == 1
    assert report.sent > report.completions > 180  # some were in flight when they were killed


def test_a_line_that_was_torn_at_any_byte_is_asked_for_again_and_no_other(
    kill_loop: ModuleType, tmp_path: Path
) -> None:
    teacher, chance = kill_loop.Teacher(latency=0.0), random.Random(3)
    with ModelServer(teacher) as server:
        recipe = kill_loop.write_recipe(tmp_path, server.url, 12)
        run = tmp_path / "torn"
        kill_loop.finish(recipe, run)
        journal = run / "rationales" / "journal.jsonl"
        wanted = parquet.read_table(run / "rationales" / "train.parquet")
        for _ in range(3):
            lines = journal.read_bytes().splitlines(keepends=True)
            torn = json.loads(lines[-1])
            left = chance.randrange(1, len(lines[-1]))
            journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:left])
            (run / "rationales" / "train.parquet").unlink()
            teacher.came = []
            kill_loop.finish(recipe, run)
            assert [seed for seed, _ in teacher.came] == [int(torn["key"], 16) % 2**31], f"{left} bytes were left"
            assert journal.read_bytes() == b"".join(lines)
            assert parquet.read_table(run / "rationales" / "train.parquet").equals(wanted)
