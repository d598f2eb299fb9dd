"""Exports of a run: held against the student, made once, whole or absent."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from distill_llm.core.errors import ConfigError
from distill_llm.core.files import read_json, write_json
from distill_llm.core.progress import SILENT
from distill_llm.evaluation.export_report import ExportReport, export_markdown
from distill_llm.evaluation.scorecard import Facts, build_scorecard, save_scorecard
from distill_llm.evaluation.statistics import paired_difference
from distill_llm.export.base import save_words
from distill_llm.export.safetensors import Safetensors
from distill_llm.models.load import load_model
from distill_llm.models.lora import add_lora
from distill_llm.models.quantize import QuantizeSpec, quantized, save_quantized
from distill_llm.models.spec import LoraSpec
from distill_llm.pipeline.export_stage import export_model, finished_exports
from distill_llm.pipeline.run_folder import RunFolder, claim
from tests.conftest import PICTURE, T5_SIZES, build_tiny, vision_sizes

if TYPE_CHECKING:
    from distill_llm.recipe.recipe import Recipe

TEXT = "is even ? predict: yes no . The answer " + " ".join(map(str, range(24)))
EVEN = ("evaluate.max_new_tokens=4", "evaluate.batch_rows=2", "evaluate.resamples=200")


def _save_arm(run: RunFolder, arm: str = "student", *, seed: int = 0, lora: bool = False) -> None:
    """A model that was never trained, in the place of one that was."""
    folder = run.model(arm)
    made = build_tiny(T5_SIZES | {"num_layers": 2, "initializer_factor": 8.0}, seed=seed, text=TEXT)
    model = made.model
    if lora:
        base = run.root.parent / "base"
        model.save_pretrained(base)
        model = add_lora(load_model(str(base), where="base"), LoraSpec(rank=2, alpha=4))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    write_json(run.result(arm), {"target": "label"})


@pytest.fixture
def run(even: Callable[..., Recipe]) -> RunFolder:
    made = claim(even(*EVEN, "task.limits={test: 12}", test=12))
    _save_arm(made)
    return made


def _export(run: RunFolder, *names: str, **options: Any) -> list[ExportReport]:
    return export_model(run.root, list(names), **{"progress": SILENT} | options)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the exports that were written, in order."""
    names: list[str] = []
    write = Safetensors.write

    def noted(self: Safetensors, student: Any, folder: Path) -> None:
        names.append(self.name)
        write(self, student, folder)

    monkeypatch.setattr(Safetensors, "write", noted)
    return names


def test_a_report_holds_an_export_against_its_student(run: RunFolder) -> None:
    (same, rough) = _export(run, "safetensors", "torchao-int4")
    assert (same.num_examples, same.same_answers) == (12, 1.0)
    assert same.loss.points == 0
    assert same.loss.low < 0 < same.loss.high
    assert same.export.accuracy == same.student.accuracy
    assert same.export.bytes == same.student.bytes == (run.model("student") / "model.safetensors").stat().st_size
    assert same.export.speed.timed_examples == 12
    assert 0 < same.export.speed.median_ms <= same.export.speed.p95_ms
    assert same.others == ()

    student, folder = read_json(run.exports("student") / "student.json"), run.export("student", "torchao-int4")
    assert rough.export.bytes == (folder / "model.safetensors").stat().st_size
    assert rough.same_answers < 1, "weights of 4 bits say something else somewhere, or nothing is compared here"
    other = rough.others[0]
    number = next(n for n, text in enumerate(student["texts"]) if text == other.student)
    assert other.export != other.student
    assert f"test-{16 + number}" == other.example_id
    assert rough.student == same.student
    right = round(12 * rough.export.accuracy)
    assert rough.loss.points == pytest.approx(sum(student["right"]) / 12 - right / 12)
    assert len(rough.others) == min(5, round(12 * (1 - rough.same_answers)))
    assert "| safetensors | 100.0 |" in export_markdown([same, rough])


def test_teachers_of_this_machine_stand_beside(run: RunFolder) -> None:
    facts = {"teacher": Facts(role="teacher", description="here", bytes=9_000_000, examples_per_second=7.5)}
    facts |= {
        "teacher far": Facts(role="teacher", description="a server"),
        "student": Facts(role="student", description=""),
    }
    card = build_scorecard(
        {name: (one, [True, True, False, True]) for name, one in facts.items()},
        student="student",
        task="jsonl",
        metric="text_accuracy",
        hardware="",
        created=datetime.date(2026, 1, 1),
        versions={},
        seed=0,
        resamples=10,
    )
    save_scorecard(run.root, card)
    (report,) = _export(run, "safetensors")
    assert [(one.name, one.accuracy, one.bytes) for one in report.teachers] == [("teacher", 0.75, 9_000_000)]
    assert "| teacher | - | 75.0 | - | 9.0 MB | - | 7.50 |" in export_markdown([report])


def test_the_interval_is_that_of_paired_answers(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    _export(run, "safetensors")
    path = run.exports("student") / "student.json"
    student = read_json(path)
    export_right = student["right"]
    student["right"] = [True] * 12
    write_json(path, student)
    (report,) = _export(run, "safetensors", force=True)
    expected = paired_difference([True] * 12, export_right, seed=0, resamples=200)
    assert (report.loss.points, report.loss.low, report.loss.high) == (expected.estimate, expected.low, expected.high)


def test_what_is_there_stays_until_the_weights_or_the_questions_change(run: RunFolder, written: list[str]) -> None:
    (first,) = _export(run, "safetensors")
    assert _export(run, "safetensors") == [first]
    assert written == ["safetensors"]
    _export(run, "safetensors", "safetensors-float16")
    assert written == ["safetensors", "safetensors-float16"]
    _export(run, "safetensors", examples=3)
    assert written[2:] == ["safetensors"]
    _export(run, "safetensors", examples=3, force=True)
    assert written[3:] == ["safetensors"]
    _save_arm(run, seed=1)
    with pytest.raises(ConfigError, match="exported from other weights than 'student' has now"):
        finished_exports(run, "student")
    (anew,) = _export(run, "safetensors", examples=3)
    assert written[4:] == ["safetensors"]
    assert anew.made_of != first.made_of
    assert anew.same_answers == 1.0, "the student was asked anew too"


def test_an_interrupted_export_leaves_nothing(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    (before,) = _export(run, "safetensors")
    with monkeypatch.context() as patched:
        patched.setattr("distill_llm.pipeline.export_stage.predict_with", _interrupted)
        for name in ("safetensors-float16", "safetensors"):
            with pytest.raises(KeyboardInterrupt):
                _export(run, name, force=True)
    assert sorted(path.name for path in run.exports("student").iterdir()) == ["safetensors", "student.json"]
    assert finished_exports(run, "student") == [(run.export("student", "safetensors"), before)]


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_adapters_are_merged(run: RunFolder) -> None:
    _save_arm(run, lora=True)
    (report,) = _export(run, "safetensors")
    assert report.same_answers == 1.0
    folder = run.export("student", "safetensors")
    assert not list(folder.glob("adapter*"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        ours, theirs = (
            load_model(str(path), where="")(input_ids=ids, decoder_input_ids=ids).logits
            for path in (run.model("student"), folder)
        )
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    base = build_tiny(T5_SIZES | {"num_layers": 2, "initializer_factor": 8.0}, seed=7, text=TEXT).model
    base.save_pretrained(run.root.parent / "base")
    with pytest.raises(ConfigError, match="other weights"):  # those below the adapter
        finished_exports(run, "student")


def test_a_student_that_sees(even: Callable[..., Recipe]) -> None:
    pytest.importorskip("PIL", reason="needs the extra pictures")
    sees = f"student={json.dumps({'config': vision_sizes(), 'picture': PICTURE, 'tokenizer': {'kind': 'words'}})}"
    run = claim(even(*EVEN, sees, run="sees"))
    made = build_tiny(vision_sizes(), text=TEXT, picture=PICTURE)
    for weight in made.model.parameters():
        torch.nn.init.normal_(weight)
    save_words(made, run.model("student"))
    made.model.save_pretrained(run.model("student"))
    write_json(run.result("student"), {"target": "label"})
    (report,) = _export(run, "safetensors")
    texts = read_json(run.exports("student") / "student.json")["texts"]
    assert len(set(texts)) > 1
    assert report.same_answers == 1.0
    assert (run.export("student", "safetensors") / "preprocessor_config.json").exists()


def test_all_leaves_out_what_cannot_hold_the_model(
    run: RunFolder, sayings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="needs the extra export")
    for slow in ("onnx.Onnx", "openvino.OpenVino", "torchao.TorchAo"):
        monkeypatch.setattr(f"distill_llm.export.{slow}.is_installed", lambda self: False)
    reports = _export(run, "all", progress=sayings)
    assert {one.format for one in reports} >= {"safetensors", "safetensors-bfloat16", "safetensors-float16"}
    assert not any(one.format.startswith(("gguf", "onnx")) for one in reports)
    assert any("gguf is left out: a t5 is none of llama, qwen2, qwen3" in said for said in sayings.said)


def test_what_cannot_be_exported_is_one_error_before_anything_is_written(
    run: RunFolder, even: Callable[..., Recipe]
) -> None:
    with pytest.raises(ConfigError, match="'onxx' is not one of"):
        _export(run, "safetensors", "onxx")
    with pytest.raises(ConfigError, match="not a run folder"):
        _export(RunFolder(run.root / "nowhere"), "safetensors")
    with pytest.raises(ConfigError, match=r"no arm 'label' is trained here; there are \['student'\]"):
        _export(run, "safetensors", arm="label")
    with pytest.raises(ConfigError, match="--format gguf: 'student' cannot be written so: a t5 is none of"):
        _export(run, "safetensors", "gguf")
    with pytest.raises(ConfigError, match="no student is trained here yet"):
        _export(claim(even(*EVEN, run="empty")), "safetensors")
    assert not run.exports("student").exists()
    model = load_model(str(run.model("student")), where="student")
    save_quantized(
        quantized(model, QuantizeSpec(group_size="row", weights="int8", activations="full")), run.model("student")
    )
    with pytest.raises(ConfigError, match="torchao's integers already"):
        _export(run, "safetensors")
