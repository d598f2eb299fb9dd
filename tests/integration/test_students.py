"""Other students than a fresh T5: decoder-only, with adapters, from a folder, tuned; and the recipe of the paper."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from distill_llm.evaluation.scorecard import load_scorecard
from distill_llm.rationales.dataset import read_rows
from tests.conftest import SHOP_WORDS

pytestmark = pytest.mark.slow


def test_adapters_on_a_decoder_only_model_that_reasons(
    cli: Any, shop: str, tmp_path: Path, save_tiny: Any, lines: Any
) -> None:
    import torch
    from safetensors.torch import load_file

    base = save_tiny("llama", text=SHOP_WORDS)
    cli(
        "run",
        shop,
        "student={model: llama, lora: {rank: 2, alpha: 4}}",
        "objective.rationale={name: reasoned, loss: {kind: cross_entropy}, targets: [rationale_then_label]}",
        "evaluate.target=rationale_then_label",
        "evaluate.max_new_tokens=24",
        "evaluate.controls=[]",
    )
    run = tmp_path / "runs" / "tiny"
    model = run / "models" / "student" / "model"
    adapter = load_file(model / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)
    assert all(weight.abs().sum() > 0 for name, weight in adapter.items() if "lora_B" in name)  # they start at zero
    assert json.loads((model / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert json.loads((run / "models" / "student" / "result.json").read_text())["target"] == "rationale_then_label"
    predictions = lines(run / "predictions" / "student.jsonl")
    assert len(predictions) == 24
    assert max(len(one["text"].split()) for one in predictions) > 4  # more than a label was written
    (entry,) = load_scorecard(run).entries
    merged = load_file(tmp_path / base / "model.safetensors")
    assert entry.parameters == sum(weight.numel() for weight in merged.values())
    assert not any(torch.isnan(weight).any() for weight in adapter.values())


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'distill-llm[quantize]'")
def test_adapters_on_a_base_of_4_bits_with_a_soft_label(cli: Any, shop: str, tmp_path: Path, save_tiny: Any) -> None:
    """QLoRA: validated on the way, beside a teacher of 4 bits, and scored as one model of its full size."""
    from safetensors.torch import load_file

    base = save_tiny("llama", text=SHOP_WORDS)
    asked = [
        "run",
        shop,
        f"student={{model: {base}, load_in: 4bit, lora: {{rank: 2, alpha: 4, rank_stabilized: true}}}}",
        f"teachers.big={{kind: frozen, model: {base}, load_in: 4bit}}",
        "objective.rationale={name: soft, loss: {kind: forward_kl}, targets: [label], teacher: big}",
        "train.validate_every=2",
        "evaluate.controls=[]",
    ]
    cli(*asked)
    run = tmp_path / "runs" / "tiny"
    model = run / "models" / "student" / "model"
    assert json.loads((model / "base_quantization.json").read_text())["bnb_4bit_quant_type"] == "nf4"
    (entry,) = load_scorecard(run).entries
    whole = load_file(tmp_path / base / "model.safetensors")
    assert entry.parameters == sum(weight.numel() for weight in whole.values())


def test_tuned_decoder_only_student(cli: Any, shop: str, tmp_path: Path) -> None:
    """A rate that can learn nothing loses on validation, for the student and for its control."""
    llama = "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}"
    said = cli(
        "run",
        shop,
        f"student.config={llama}",
        "train.optimizer=adamw",
        "train.tune=[1e-9, 1e-2]",
        "train.max_steps=60",
        "train.validate_every=60",
        "task.train_size=128",
        "task.validation_size=64",
        "evaluate.controls=[labels_same_steps]",
    ).stdout
    assert "student, rate 1e-09: 60 of 60" in said
    run = tmp_path / "runs" / "tiny"
    for arm in ("student", "labels_same_steps"):
        result = json.loads((run / "models" / arm / "result.json").read_text())
        scores = {trial["learning_rate"]: trial["validation_accuracy"] for trial in result["trials"]}
        assert sorted(scores) == [1e-9, 1e-2]
        assert scores[1e-2] > scores[1e-9]
        assert result["learning_rate"] == 1e-2
        assert sorted(path.name for path in (run / "models" / arm).iterdir()) == ["model", "plan.json", "result.json"]
    assert "each of the learning rates [1e-09, 0.01]" in (run / "scorecard.md").read_text()


def _cqa_folder(folder: Path, **counts: int) -> str:
    """All words in it, for a tokenizer. The layout is that of the released data of Hsieh et al. 2023."""
    folder.mkdir()
    things, words = ("torch", "comb", "fork", "belt", "glue"), ["predict explain : Answer Choices ( )"]
    for split, count in counts.items():
        rows = [
            {
                "id": f"{split}-{i}",
                "question": f"What is number {i} of {split} used for?",
                "choices": [*things[i % 5 :], *things[: i % 5]],
                "answer": things[i % 3],
                "abstractive_explanation": f"{things[i % 3]} fits number {i}",
            }
            for i in range(count)
        ]
        (folder / f"cqa_{split}.json").write_text(json.dumps(rows))
        words.append(json.dumps(rows))
    return " ".join(words)


def test_the_paper_s_recipe_asks_a_local_teacher(cli: Any, tmp_path: Path, save_tiny: Any, lines: Any) -> None:
    """recipes/t5-base.yaml as it is, but for the Hub ids and the length; an untrained model states no answer."""
    model = save_tiny("t5", text=_cqa_folder(tmp_path / "cqa", train=30, test=9), tokenizer="bytes_bpe")
    cli(
        "generate-rationales",
        "recipes/t5-base.yaml",
        f"student.model={model}",
        f"rationales.teacher.model={model}",
        "rationales.sampling.max_new_tokens=4",
        "task.data=cqa",  # a folder of the name that the exemplars have
        "run_dir=paper",
    )
    run = tmp_path / "paper"
    asked = lines(run / "rationales" / "journal.jsonl")
    assert len(asked) == 27 + 9  # a tenth of train is validation, and the teacher is scored on test
    assert asked[0]["tokens_in"] > 500  # the exemplars that came with the package
    assert len(list(read_rows(run / "rationales" / "train.parquet"))) == 27


def test_the_paper_s_recipe_with_replayed_texts(cli: Any, tmp_path: Path, save_tiny: Any) -> None:
    """All stages, with the override that the recipe's head comment gives for the published texts."""
    model = save_tiny("t5", text=_cqa_folder(tmp_path / "cqa", train=30, test=9))
    for split, count in (("train", 30), ("test", 9)):
        right = [f"it fits. So the answer is {('torch', 'comb', 'fork')[i % 3]}." for i in range(count)]
        (tmp_path / "cqa" / f"{split}_CoT_0.json").write_text(json.dumps(right))
    cli(
        "run",
        "recipes/t5-base.yaml",
        f"student.model={model}",
        "rationales.teacher={kind: replay, files: {train: cqa/train_CoT_*.json, test: cqa/test_CoT_*.json}}",
        "task.data=cqa",
        "train.max_steps=2",
        "train.rows_per_step=8",
        "train.rows_per_batch=4",
        "evaluate.max_new_tokens=4",
        "evaluate.resamples=200",
        "run_dir=paper",
    )
    funnel = json.loads((tmp_path / "paper" / "rationales" / "funnel.json").read_text())
    assert (funnel["train"]["kept"], funnel["train"]["accuracy"]) == (27, 1.0)
    assert (funnel["test"]["completed"], funnel["test"]["accuracy"]) == (9, 1.0)
    card = load_scorecard(tmp_path / "paper")
    assert [entry.role for entry in card.entries] == ["teacher", "student", "control", "control"]
    assert (card.entries[0].accuracy, card.entries[0].parameters) == (1.0, None)
    assert {comparison.num_examples for comparison in card.comparisons} == {9}


def test_logs_outlive_the_training(cli: Any, shop: str, tmp_path: Path) -> None:
    """Each term's mean is in them; the checkpoints beside which Trainer would put them are gone."""
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cli("run", shop, "train.report_to=[tensorboard]", "evaluate.controls=[]")
    (events,) = (tmp_path / "runs/tiny/models/student/tensorboard").rglob("events*")
    log = EventAccumulator(str(events)).Reload()
    assert {"train/loss_label", "train/loss_rationale", "eval/accuracy"} <= set(log.Tags()["scalars"])
    assert log.Scalars("train/loss_label")[-1].step == 8


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_missing_logger_is_said_before_anything_is_written(cli: Any, shop: str, tmp_path: Path) -> None:
    done = cli("run", shop, "train.report_to=[wandb]", expect=2)
    assert "train.report_to: wandb is not installed. Install it (pip install wandb), or remove it." in done.stderr
    assert not (tmp_path / "runs").exists()
