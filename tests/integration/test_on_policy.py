"""On-policy distillation from the command line: our trainer, the trainer of TRL, and the student as its own teacher."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
QUESTIONS = Path(__file__).resolve().parents[2] / "data/sample/questions.jsonl"

SAMPLE = f"""\
name: sample
task:
  kind: jsonl
  data: {QUESTIONS}
  fields: {{input: question, label: label, id: id, rationale: rationale, choices: choices}}
rationales: {{teacher: {{kind: gold}}}}
student:
  config: STUDENT
  tokenizer: TOKENIZER
teachers:
  big: TEACHER
scheme: SCHEME
objective: OBJECTIVE
train:
  {{optimizer: adafactor, learning_rate: 2.0e-2, max_steps: 4, rows_per_step: 8, rows_per_batch: 4,
   max_input_tokens: 128, max_target_tokens: 48, validate_every: 2}}
evaluate: {{resamples: 200, max_new_tokens: 4, controls: [CONTROLS]}}
"""
T5 = "{model_type: t5, d_model: 16, d_kv: 8, d_ff: 32, num_layers: 1, num_heads: 2, dropout_rate: 0.1}"
LLAMA = (
    "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 4, "
    "num_key_value_heads: 2, max_position_embeddings: 512}"
)
BOTH = """
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}
  - {name: soft, loss: {kind: jensen_shannon, mixture: 0.9}, targets: [rationale], teacher: big}"""
ALONE = """
  - {name: soft, loss: {kind: reverse_kl}, targets: [rationale_then_label], teacher: big}"""


@pytest.fixture
def sample(tmp_path: Path) -> Any:
    def write(**places: str) -> str:
        text = SAMPLE
        for place, value in ({"CONTROLS": ""} | places).items():
            text = text.replace(place, value)
        (tmp_path / "sample.yaml").write_text(text)
        return "sample.yaml"

    return write


def _result(tmp_path: Path, arm: str = "student") -> dict[str, Any]:
    return json.loads((tmp_path / f"runs/sample/models/{arm}/result.json").read_text())


@pytest.mark.parametrize(("family", "student"), [("t5", T5), ("llama", LLAMA)])
def test_the_student_writes_and_a_teacher_judges(
    cli: Any, sample: Any, save_tiny: Any, tmp_path: Path, family: str, student: str
) -> None:
    big = save_tiny(family, text=QUESTIONS.read_text(), tokenizer="bytes_bpe")
    scheme = "{kind: on_policy, student_fraction: 0.5, draw: row, max_new_tokens: 8}"
    teacher = f"{{kind: frozen, model: {big}}}"
    recipe = sample(STUDENT=student, TOKENIZER=big, TEACHER=teacher, SCHEME=scheme, OBJECTIVE=BOTH)
    (tmp_path / "cached.yaml").write_text(
        (tmp_path / recipe).read_text().replace("teachers:", "teachers:\n  disk: {kind: cached, of: big}")
    )
    done = cli("run", "cached.yaml", "objective.soft.teacher=disk", "objective.soft.loss={kind: forward_kl}", expect=2)
    assert "what it says of the data's texts was written down before" in " ".join(done.stderr.split())
    assert not (tmp_path / "runs").exists()
    cli("run", recipe)
    assert _result(tmp_path)["steps"] == 4
    assert "student" in (tmp_path / "runs/sample/scorecard.md").read_text()


def test_the_student_is_its_own_teacher_where_it_is_shown_the_rationale(cli: Any, sample: Any, tmp_path: Path) -> None:
    view = "{template: '{input}', rationale: true, gold_label: true}"
    recipe = sample(
        STUDENT=T5,
        TOKENIZER="{kind: bytes_bpe, vocab_size: 300}",
        TEACHER=f"{{kind: ema, decay: 0, view: {view}}}",
        SCHEME="{kind: on_policy, max_new_tokens: 8}",
        OBJECTIVE=BOTH,
    )
    assert "teacher big: reads up to" in " ".join(cli("run", recipe).stdout.split())
    assert _result(tmp_path)["steps"] == 4


def test_what_trl_cannot_do_is_refused_before_anything_is_written(
    cli: Any, sample: Any, save_tiny: Any, tmp_path: Path
) -> None:
    big = save_tiny("llama", text=QUESTIONS.read_text(), tokenizer="bytes_bpe")
    scheme = "{kind: on_policy, student_fraction: 1, engine: trl}"
    teacher = f"{{kind: frozen, model: {big}}}"
    recipe = sample(STUDENT=LLAMA, TOKENIZER=big, TEACHER=teacher, SCHEME=scheme, OBJECTIVE=ALONE)
    done = cli("run", recipe, "scheme.student_fraction=0.5", expect=2)
    assert "has the student write all texts" in " ".join(done.stderr.split())
    if importlib.util.find_spec("trl") is None:
        assert "pip install 'distill-llm[trl]'" in " ".join(cli("run", recipe, expect=2).stderr.split())
    else:
        done = cli("run", recipe, f"student.config={T5}", expect=2)
        assert "trains decoder-only students" in " ".join(done.stderr.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL: pip install 'distill-llm[trl]'")
def test_trl_trains_the_student_and_ours_its_controls(
    cli: Any, sample: Any, save_tiny: Any, tmp_path: Path, lines: Any
) -> None:
    big = save_tiny("llama", text=QUESTIONS.read_text(), tokenizer="bytes_bpe")
    recipe = sample(
        STUDENT=LLAMA,
        TOKENIZER=big,
        TEACHER=f"{{kind: frozen, model: {big}}}",
        SCHEME="{kind: on_policy, student_fraction: 1, engine: trl, max_new_tokens: 8}",
        OBJECTIVE=ALONE,
        CONTROLS="labels_same_steps",
    )
    cli("run", recipe, "evaluate.target=rationale_then_label")
    assert _result(tmp_path)["steps"] == 4
    assert _result(tmp_path, "labels_same_steps")["steps"] == 4
    for arm in ("student", "labels_same_steps"):
        assert lines(tmp_path / f"runs/sample/predictions/{arm}.jsonl")
    folder = tmp_path / "runs/sample/models/student/model"
    assert {path.name for path in folder.glob("*")} >= {"config.json", "model.safetensors", "tokenizer.json"}
