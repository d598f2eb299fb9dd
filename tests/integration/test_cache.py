"""Cached teachers through the command line: killed, resumed, in two processes, and trained with."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill_llm.cache.shards import Shards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TEXT = (
    "predict explain : . + = > < ? ann bob carl dora emil fay gus hana buys and who pays more "
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"
)
CACHED = """\
  - {name: soft, loss: {kind: forward_kl, temperature: 2.0}, targets: [label, rationale], teacher: kept}
teachers:
  big: {kind: frozen, model: ./t5}
  kept: {kind: cached, of: big}
"""
LABELS = ("evaluate.controls=[]", "student.tokenizer=./t5")
ROWS = 114
"""Of 64 examples with two rows each: to the teacher's tokenizer, which lacks some words, some are the same."""
HIDDEN = "teachers.kept.payload={kind: last_hidden, dtype: float32}"


@pytest.fixture
def recipe(shop: str, save_tiny: Any, tmp_path: Path) -> str:
    """The small recipe with a cached teacher of random weights, which are louder than fresh ones."""
    save_tiny("t5", text=TEXT, seed=5, d_model=32)
    (path,) = (tmp_path / "t5").glob("*.safetensors")
    from safetensors.torch import save_file

    weights = load_file(path)
    made = torch.Generator().manual_seed(1)
    save_file(
        {name: weight + 0.1 * torch.randn(weight.shape, generator=made) for name, weight in weights.items()},
        path,
        {"format": "pt"},
    )
    text = (tmp_path / shop).read_text()
    (tmp_path / "cached.yaml").write_text(text.replace("train:\n", CACHED + "train:\n", 1))
    return "cached.yaml"


def test_training_from_last_hidden_states_is_training_beside_the_teacher(cli: Any, recipe: str, tmp_path: Path) -> None:
    """Label and soft term, float32, all steps: the same student but for rounding. `run` writes the cache itself."""
    said = cli("run", recipe, *LABELS, HIDDEN, "run_dir=cached").stdout
    assert f"signals of kept: {ROWS} rows, 0 of them there already" in said
    cli("run", recipe, *LABELS, "objective.soft.teacher=big", "run_dir=online")
    cli("run", recipe, *LABELS, "objective.soft.weight=1e-9", "objective.soft.teacher=big", "run_dir=without")
    cached, online, without = (
        load_file(tmp_path / run / "models/student/model/model.safetensors") for run in ("cached", "online", "without")
    )
    for name, weight in online.items():
        torch.testing.assert_close(cached[name], weight, atol=2e-5, rtol=1e-4)
    assert max(float((without[name] - weight).abs().max()) for name, weight in online.items()) > 1e-2


def test_a_cache_that_is_killed_goes_on_and_is_complete(cli: Any, start: Any, recipe: str, tmp_path: Path) -> None:
    words = (recipe, *LABELS, "teachers.kept.shard_megabytes=0.002", "train.rows_per_batch=2")
    cli("generate-rationales", *words)
    refused = cli("train", *words, expect=2)
    assert f"lacks {ROWS} of {ROWS} rows. First type: distill-llm cache-signals RECIPE" in refused.stderr
    folder, end = tmp_path / "runs/tiny/signals/kept", time.monotonic() + 120
    process = start("cache-signals", *words)
    while len(list(folder.glob("shard-*"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    there = len(Shards(folder))
    assert 0 < there < ROWS, "killed too late"
    refused = cli("train", *words, expect=2)
    assert f"lacks {ROWS - there} of {ROWS} rows" in refused.stderr

    said = cli("cache-signals", *words, COLUMNS="200").stdout
    assert f"signals of big (kept): {ROWS - there} of {ROWS - there}" in said
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}.items()
    line = next(line for line in said.splitlines() if line.startswith("kept "))
    assert line.split()[1:3] == [str(ROWS), str(there)]
    assert line.split()[5].endswith("%")
    cli("train", *words)

    torn = sorted(folder.glob("shard-*"))[0]
    torn.write_bytes(torn.read_bytes()[:-3])
    refused = cli("train", *words, expect=2)
    assert f"{torn.name}: this shard of the cache is damaged" in refused.stderr


def in_two_processes(folder: Path, *words: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "distill_llm", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("payload", ["{kind: top_k, k: 8}", "{kind: sampled}"])
def test_two_processes_write_and_learn_what_one_does(cli: Any, recipe: str, tmp_path: Path, payload: str) -> None:
    more = ("student.config.dropout_rate=0.0", "train.rows_per_batch=4")
    words = (recipe, *LABELS, *more, f"teachers.kept.payload={payload}")
    for run in ("one", "two"):
        cli("generate-rationales", *words, f"run_dir={run}")
    for command in ("cache-signals", "train"):
        cli(command, *words, "run_dir=one")
        in_two_processes(tmp_path, command, *words, "run_dir=two")
    one, two = (Shards(tmp_path / run / "signals/kept") for run in ("one", "two"))
    assert {path.name[:8] for path in (tmp_path / "two/signals/kept").glob("shard-*")} == {"shard-0-", "shard-1-"}
    files = (tmp_path / "one/signals/kept").glob("shard-*")
    keys = sorted(key for path in files for key in load_file(path)["row_keys"].tolist())
    assert len(keys) == len(one) == len(two) == ROWS
    for name, column in one.read(keys)[0].items():
        other = two.read(keys)[0][name]
        assert (column == other).mean() > 0.999, f"{name}: batches differ, and with them a rounding here and there"
    weights = [load_file(tmp_path / run / "models/student/model/model.safetensors") for run in ("one", "two")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=1e-3)
