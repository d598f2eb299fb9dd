"""A run's model on its way to a Hub and back: the card, its snippet, and plain ``from_pretrained``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_llm.evaluation.scorecard import load_scorecard
from tests.hub_server import TOKEN, HubServer

pytestmark = pytest.mark.slow

_LLAMA = "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        yield server


def _online(hub: HubServer, token: str = TOKEN) -> dict[str, str | None]:
    return {**hub.environment(token=token), "HF_HUB_OFFLINE": None, "HF_DATASETS_OFFLINE": None}


def _run_snippet(hub: HubServer, card: str, folder: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=hub.environment(token=TOKEN),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    return done.stdout.rstrip("\n")


@pytest.mark.parametrize(
    "student",
    [
        [],
        ["student.prefix_side=decoder"],
        [f"student.config={_LLAMA}", "train.optimizer=adamw"],
    ],
    ids=["t5", "t5-decoder-prefix", "llama"],
)
def test_a_pushed_model_answers_as_its_scorecard_says(
    student: list[str], hub: HubServer, cli: Callable[..., Any], shop: str, tmp_path: Path
) -> None:
    cli("run", shop, *student, "train.max_steps=40", "train.validate_every=40", "evaluate.controls=[labels_same_steps]")
    run = tmp_path / "runs" / "tiny"
    asked = ["push", str(run), "--repo-id", "ann/tiny-shop", "--licence", "mit"]
    listed = cli(*asked, "--dry-run").stdout
    assert "model.safetensors" in listed
    assert "Nothing was sent." in listed
    assert not hub.repositories

    assert "Pushed (private)" in cli(*asked, "--rationales", **_online(hub)).stdout
    assert "Nothing to do" in cli(*asked, "--rationales", **_online(hub)).stdout
    repository = hub.repositories["model", "ann/tiny-shop"]
    assert repository.private
    assert len(repository.commits) == 2, "the Hub's own, and one of ours"
    sent = repository.contents()
    assert {"distill/recipe.yaml", "distill/scorecard.json", "rationales/train.parquet", "tokenizer.json"} <= set(sent)

    card = sent["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    (result,) = head["model-index"][0]["results"]
    entries = {entry.name: entry for entry in load_scorecard(run).entries}
    assert result["metrics"][0]["value"] == round(entries["student"].accuracy, 6)
    assert head["license"] == "mit"
    assert "| labels same steps | control |" in card
    first = json.loads((run / "predictions" / "student.jsonl").read_text().splitlines()[0])
    assert _run_snippet(hub, card, tmp_path).strip() == first["text"].strip()
    assert first["text"] in card


def test_adapters_on_a_local_base_are_sent_merged(
    hub: HubServer, cli: Callable[..., Any], shop: str, tmp_path: Path, save_tiny: Any
) -> None:
    """Nobody else could load an adapter on a folder of this machine."""
    base = save_tiny("llama", text="predict explain so ann bob carl buys and . who pays more ? + = > <")
    asked = ["run", shop, f"student={{model: {base}, lora: {{rank: 2, alpha: 4}}}}", "evaluate.controls=[]"]
    cli(*asked)
    cli("push", "runs/tiny", "--repo-id", "ann/merged", **_online(hub))
    sent = hub.repositories["model", "ann/merged"].contents()
    assert "model.safetensors" in sent
    assert not any("adapter" in name for name in sent)
    card = sent["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert "parameters, from `llama`, for one task" in card
    first = json.loads((tmp_path / "runs/tiny/predictions/student.jsonl").read_text().splitlines()[0])
    assert _run_snippet(hub, card, tmp_path).strip() == first["text"].strip()
    cli(*asked, "train.seed=5", "--retrain")
    cli("push", "runs/tiny", "--repo-id", "ann/merged", **_online(hub))
    anew = hub.repositories["model", "ann/merged"].contents()
    assert anew["model.safetensors"] != sent["model.safetensors"], "not what was merged before"


def test_what_cannot_be_pushed_is_one_error(hub: HubServer, cli: Callable[..., Any], shop: str) -> None:
    cli("run", shop, "evaluate.controls=[]")
    asked = ["push", "runs/tiny", "--repo-id", "ann/tiny"]
    wrong = cli(*asked, "--arm", "teacher", expect=2)
    assert "no arm 'teacher' is trained here; there are ['student']" in wrong.stderr
    refused = cli(*asked, expect=2, **_online(hub, "hf_no"))
    assert "does not accept the token" in refused.stderr
    hub.create("model", "ann/tiny", private=False)
    public = cli(*asked, expect=2, **_online(hub))
    assert "it is public, and a private one was asked for" in public.stderr
    hub.fail("PUT", "")
    broken = cli(*asked, "--public", expect=2, **_online(hub))
    assert "the upload broke off" in broken.stderr
    hub.faults.clear()
    assert "Pushed (public)" in cli(*asked, "--public", **_online(hub)).stdout
