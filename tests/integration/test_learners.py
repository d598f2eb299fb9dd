"""Peers, and exits of one student, through the command line: trained, kept, scored, resumed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from distill_llm.evaluation.scorecard import load_scorecard

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow
LLAMA = (
    "student.config={model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, "
    "num_attention_heads: 2}"
)
WORDS = (
    "predict explain reason : so ann bob carl dora emil fay gus hana buys and . who pays more ? + = > < "
    + " ".join(map(str, range(41)))
)
QUICK = ("train.max_steps=8", "train.validate_every=4", "evaluate.controls=[]", "task.test_size=16")


def _models(run: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in (run / "models").glob("*/result.json")}


def test_peers_of_two_sizes_beside_a_frozen_teacher(cli: Any, shop: str, tmp_path: Path, save_tiny: Any) -> None:
    """Each peer is a folder of its own that plain transformers loads; the better one is the student."""
    from transformers import AutoModelForSeq2SeqLM

    save_tiny("t5", text=WORDS, d_model=12)
    wide = "{name: wide, config: {model_type: t5, d_model: 24, d_kv: 8, d_ff: 32, num_layers: 1, num_heads: 2}}"
    hint = "{name: hint, loss: {kind: hint}, targets: [label], teacher: big, weight: 0.1}"
    said = cli(
        "run",
        shop,
        *QUICK,
        "student.tokenizer=t5",
        "teachers={big: {kind: frozen, model: t5}}",
        f"scheme={{kind: mutual, peers: [{wide}]}}",
        "objective=[{name: label, loss: {kind: cross_entropy}, targets: [label]}, "
        "{name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}, "
        "{name: big, loss: {kind: forward_kl}, targets: [label], teacher: big}, "
        f"{hint}, "
        "{name: mutual, loss: {kind: forward_kl}, targets: [label, rationale], teacher: peers}]",
        "evaluate.ablations={apart: [label, rationale]}",
    ).stdout
    run = tmp_path / "runs" / "tiny"
    found = _models(run)
    chosen = found["student"]["learner"]
    other = ({"peer_1", "wide"} - {chosen}).pop()
    assert set(found) == {"student", other, "apart"}
    assert found["student"]["description"].endswith(f"({chosen}, the best of 2 on validation)")
    assert (
        found[other]["description"]
        == "a peer of the student, from its training: label + rationale + big + hint + mutual"
    )
    assert found["student"]["validation_accuracy"] >= found[other]["validation_accuracy"]
    widths = {"peer_1": 16, "wide": 24}
    for arm, name in (("student", chosen), (other, other)):
        model = AutoModelForSeq2SeqLM.from_pretrained(run / "models" / arm / "model")
        assert model.config.d_model == widths[name]
        assert (run / "models" / arm / "model" / "tokenizer.json").is_file()
    entries = {entry.name: entry for entry in load_scorecard(run).entries}
    assert set(entries) == {"student", other.replace("_", " "), "apart"}
    assert entries["student"].parameters != entries[other.replace("_", " ")].parameters
    assert "test, wide: 16 of 16" in said or "test, peer 1: 16 of 16" in said
    assert not list((run / "models").rglob("others"))


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_exits_are_models_of_their_own(family: str, cli: Any, shop: str, tmp_path: Path) -> None:
    """Each answers from its own folder what it was scored with; an average of the student teaches beside."""
    from transformers import AutoConfig

    sizes = [LLAMA] if family == "llama" else ["student.config.num_layers=3"]
    exits = [1] if family == "llama" else [1, 2]
    cli(
        "run",
        shop,
        *QUICK,
        *sizes,
        f"scheme={{kind: self_distill, exits: {exits}}}",
        "teachers={own: {kind: ema}}",
        "objective=[{name: label, loss: {kind: cross_entropy}, targets: [label]}, "
        "{name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}, "
        "{name: own, loss: {kind: forward_kl}, targets: [label], teacher: own}, "
        "{name: deep, loss: {kind: forward_kl, temperature: 2}, targets: [label, rationale], teacher: deepest}]",
    )
    run = tmp_path / "runs" / "tiny"
    found = _models(run)
    assert set(found) == {"student", *(f"exit_{layers}" for layers in exits)}
    assert found["exit_1"]["description"].startswith(
        "the student's decoder cut to its first 1 layers, from its training"
    )
    key = "num_hidden_layers" if family == "llama" else "num_decoder_layers"
    for layers in exits:
        assert getattr(AutoConfig.from_pretrained(run / "models" / f"exit_{layers}" / "model"), key) == layers
    entries = {entry.name: entry.parameters or 0 for entry in load_scorecard(run).entries}
    depths = ["exit 1", *(["exit 2"] if family == "t5" else []), "student"]
    assert [entries[name] for name in depths] == sorted(set(entries.values())), "deeper is larger"
    assert all(entry.examples_per_second for entry in load_scorecard(run).entries)


def test_peers_with_adapters(cli: Any, shop: str, tmp_path: Path, save_tiny: Any) -> None:
    """Two adapters on one base, which differ by their seed; each is saved as an adapter."""
    from safetensors.torch import load_file

    words = (
        "predict explain : ann bob carl dora emil fay gus hana buys and . who pays more ? + = > < 1 2 3 4 5 6 7 8 9 0"
    )
    save_tiny("llama", text=words)
    cli(
        "run",
        shop,
        *QUICK,
        "student={model: llama, lora: {rank: 2, alpha: 4}}",
        "scheme={kind: mutual, peers: 2}",
        "objective.rationale={name: mutual, loss: {kind: forward_kl}, targets: [label], teacher: peers}",
    )
    folders = sorted((tmp_path / "runs" / "tiny" / "models").glob("*/model"))
    assert len(folders) == 2
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert one.keys() == other.keys()
    assert any(not torch.equal(weight, other[name]) for name, weight in one.items())


def test_two_kinds_of_one_base_without_dropout_are_refused(cli: Any, shop: str, save_tiny: Any) -> None:
    save_tiny("llama", text=WORDS)
    said = cli(
        "run",
        shop,
        *QUICK,
        "student={model: llama}",
        "scheme={kind: mutual}",
        "objective.rationale={name: mutual, loss: {kind: forward_kl}, targets: [label], teacher: peers}",
        expect=2,
    ).stderr
    assert "peer_1 and peer_2 start from the same weights" in " ".join(said.split())
