"""Stage one under torchrun: each process asks its share, and what comes out is what one process would have made."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import parquet

from tests.servers import ModelServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # many starts of the command, each of seconds
EXAMPLES, SAMPLES = 15, 2  # an odd number, so that the shares differ


def _recipe(folder: Path, teacher: dict[str, Any], **rationales: Any) -> Path:
    recipe = {
        "name": "shared",
        "task": {"kind": "shop", "train_size": EXAMPLES, "validation_size": 4, "test_size": 5},
        "rationales": {
            "teacher": teacher,
            "sampling": {"temperature": 0.8, "max_new_tokens": 12},
            "samples": SAMPLES,
            "keep": [],
            **rationales,
        },
        "student": {"config": {"model_type": "t5"}, "tokenizer": {"kind": "words"}},
        "objective": [{"name": "label", "loss": {"kind": "cross_entropy"}, "targets": ["label"]}],
        "train": {"learning_rate": 0.01, "max_steps": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def _generate(recipe: Path, run: Path, *words: str, processes: int = 1) -> str:
    """What the real command says; torchrun lets it know who it is."""
    start = [sys.executable, "-m", "distill_llm"]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch = ["--nproc_per_node", str(processes), "--master_addr", "127.0.0.1", "--master_port", str(port)]
        start = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "distill_llm"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*start, "generate-rationales", str(recipe), f"run_dir={run}", *words],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
        cwd=recipe.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _tables_are_equal(one: Path, other: Path) -> None:
    """All columns of all rows, in their order."""
    for split in ("train", "test"):
        tables = [parquet.read_table(run / "rationales" / f"{split}.parquet") for run in (one, other)]
        assert tables[0].num_rows == {"train": EXAMPLES, "test": 5}[split] * SAMPLES
        assert tables[0].equals(tables[1]), split


def _spent(run: Path) -> dict[str, Any]:
    return json.loads((run / "rationales" / "spent.json").read_text(encoding="utf-8"))


def _ledgers_add_up(run: Path, processes: int) -> None:
    """Each process's ledger tells of its own journal, and the report of all of them."""
    whole = {"completions": 0, "requests": 0, "tokens_in": 0, "tokens_out": 0}
    for number in range(processes):
        end = f".{number}" if number else ""
        entries = _entries(run / "rationales" / f"journal{end}.jsonl")
        ledger = json.loads((run / "rationales" / f"ledger{end}.json").read_text(encoding="utf-8")).values()
        for name in ("completions", "tokens_in", "tokens_out"):
            wanted = len(entries) if name == "completions" else sum(entry[name] for entry in entries)
            assert sum(split[name] for split in ledger) == wanted, (number, name)
        for name in whole:
            whole[name] += sum(split[name] for split in ledger)
    total = _spent(run)["total"]
    assert {name: total[name] for name in whole} == whole
    assert total["completions"] == total["requests"] == (EXAMPLES + 5) * SAMPLES


def _same_journals(one: Path, other: Path, processes: int) -> None:
    """Each completion is in one journal, as the one process wrote it; each example is one process's."""
    alone = {entry["key"]: entry for entry in _entries(one / "rationales" / "journal.jsonl")}
    names = ["journal.jsonl", *(f"journal.{number}.jsonl" for number in range(1, processes))]
    assert sorted(path.name for path in (other / "rationales").glob("journal*")) == sorted(names)
    parts = [_entries(other / "rationales" / name) for name in names]
    together = [entry for part in parts for entry in part]
    assert len(together) == len(alone)
    assert {entry["key"]: entry for entry in together} == alone
    examples = [{(entry["split"], entry["example"]) for entry in part} for part in parts]
    assert all(examples)
    assert sum(map(len, examples)) == len(set.union(*examples)) == EXAMPLES + 5


def _answer(body: dict[str, Any]) -> str:
    """Other samples have other seeds, and so other answers."""
    time.sleep(0.02)
    first, _, rest = body["prompt"].partition(" buys ")
    names = (first, rest.partition(" . ")[2].partition(" ")[0])
    return f"{body['seed'] % 97} against {body['seed'] % 89} . so {names[body['seed'] % 2]}"


def test_processes_that_ask_a_server_make_the_data_set_of_one(tmp_path: Path) -> None:
    """And another number of processes asks nothing again, whether all is there or only one process's share."""
    with ModelServer(_answer) as server:
        teacher = {"kind": "openai_compatible", "model": "tiny", "base_url": server.url, "api": "completions"}
        recipe = _recipe(tmp_path, teacher, hint_retry={"template": "{question} ({answer})"}, keep=[{"kind": "dedupe"}])
        one, two = tmp_path / "one", tmp_path / "two"
        _generate(recipe, one)
        asked = len(server.seen)
        _generate(recipe, two, processes=2)
        sent = [seen.body["seed"] for seen in server.seen]
        assert sorted(sent[asked:]) == sorted(sent[:asked])
        assert len(set(sent)) == asked > (EXAMPLES + 5) * SAMPLES  # hints were needed
        tables = [parquet.read_table(run / "rationales" / "train.parquet") for run in (one, two)]
        assert tables[0].equals(tables[1])
        assert any(tables[0]["hinted"].to_pylist())
        total, before = _spent(two)["total"], _spent(one)["total"]
        for name in ("completions", "requests", "tokens_in", "tokens_out", "failures"):
            assert total[name] == before[name], name

        for processes in (1, 3):
            (two / "rationales" / "made_of.json").unlink()
            (two / "rationales" / "train.parquet").unlink()
            _generate(recipe, two, processes=processes)
            assert len(server.seen) == 2 * asked
            assert parquet.read_table(two / "rationales" / "train.parquet").equals(tables[0])

        lost = _entries(two / "rationales" / "journal.1.jsonl")
        for path in (two / "rationales").glob("journal.*.jsonl"):
            path.unlink()
        _generate(recipe, two)
        again = sorted(seen.body["seed"] for seen in server.seen[2 * asked :])
        assert again == sorted(int(entry["key"], 16) % 2**31 for entry in lost)
        assert parquet.read_table(two / "rationales" / "train.parquet").equals(tables[0])


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_processes_that_sample_write_the_texts_of_one(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A draw depends on the request's key alone: neither on the process nor on the rows beside it."""
    text = "ann bob buys and . who pays more ? so 1 2 3 + = > <"
    made = request.getfixturevalue(f"tiny_{family}")(text=text)
    made.model.save_pretrained(tmp_path / family)
    made.tokenizer.save_pretrained(tmp_path / family)
    # a whole path would be another in each test run, and with it every key and every draw
    recipe = _recipe(tmp_path, {"kind": "transformers", "model": family, "batch_rows": 4})
    one, two = tmp_path / "one", tmp_path / "two"
    _generate(recipe, one)
    texts: dict[tuple[str, str], set[str]] = defaultdict(set)
    for entry in _entries(one / "rationales" / "journal.jsonl"):
        texts[entry["split"], entry["example"]].add(entry["text"])
    differ = sum(len(samples) == SAMPLES for samples in texts.values())
    assert differ > len(texts) // 2, "the samples of an example hardly differ: nothing is drawn"
    _generate(recipe, two, processes=2)
    _same_journals(one, two, 2)
    _tables_are_equal(one, two)
    _ledgers_add_up(two, 2)
    before = {path.name: path.read_bytes() for path in (two / "rationales").glob("journal*")}
    said = _generate(recipe, two)
    assert {path.name: path.read_bytes() for path in (two / "rationales").glob("journal*")} == before
    assert f"{(EXAMPLES + 5) * SAMPLES} of {(EXAMPLES + 5) * SAMPLES} completions are there already" in said
