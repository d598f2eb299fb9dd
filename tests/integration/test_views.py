"""Teachers that read more than the student, or with other tokens, through the command line."""

from __future__ import annotations

import json
import re
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
  config: {{model_type: t5, d_model: 16, d_kv: 8, d_ff: 32, num_layers: 1, num_heads: 2, dropout_rate: 0.1}}
  tokenizer: TOKENIZER
teachers: {{big: TEACHER}}
objective:
  - {{name: label, loss: {{kind: cross_entropy}}, targets: [label]}}
  - {{name: rationale, loss: {{kind: cross_entropy}}, targets: [rationale]}}
  - {{name: soft, loss: {{kind: LOSS}}, targets: [rationale], teacher: big}}
train:
  {{optimizer: adafactor, learning_rate: 2.0e-2, max_steps: 6, rows_per_step: 16, rows_per_batch: 8,
   max_input_tokens: 128, max_target_tokens: 96, validate_every: 3}}
evaluate: {{resamples: 200, max_new_tokens: 4, controls: []}}
"""


@pytest.fixture
def sample(tmp_path: Path) -> Any:
    def write(*, teacher: str, loss: str, tokenizer: str = "{kind: bytes_bpe, vocab_size: 300}") -> str:
        text = SAMPLE.replace("TOKENIZER", tokenizer).replace("TEACHER", teacher).replace("LOSS", loss)
        (tmp_path / "sample.yaml").write_text(text)
        return "sample.yaml"

    return write


def _steps(tmp_path: Path) -> dict[str, int]:
    found = (tmp_path / "runs/sample/models").glob("*/result.json")
    return {path.parent.name: json.loads(path.read_text())["steps"] for path in found}


def test_a_llama_teaches_a_t5_with_another_tokenizer(cli: Any, sample: Any, save_tiny: Any, tmp_path: Path) -> None:
    llama = save_tiny("llama", text=QUESTIONS.read_text(), tokenizer="bytes_bpe")
    recipe = sample(teacher=f"{{kind: frozen, model: {llama}, own_tokenizer: true}}", loss="universal_logit")
    done = cli("run", recipe, "objective.soft.loss={kind: forward_kl}", expect=2)
    assert "forward_kl compares word with word" in done.stderr
    said = " ".join(cli("run", recipe).stdout.split())
    assert re.search(r"teacher big: reads up to \d+ tokens a row; [\d,]+ of [\d,]+ tokens have no counterpart", said)
    assert _steps(tmp_path) == {"student": 6}


def test_a_teacher_with_exemplars_and_the_gold_label_in_sight(
    cli: Any, sample: Any, save_tiny: Any, tmp_path: Path
) -> None:
    t5 = save_tiny("t5", text=f"{QUESTIONS.read_text()} predict explain : ( ) Q A Hint")
    view = "{exemplars: cqa, num_exemplars: 2, gold_label: true}"
    recipe = sample(teacher=f"{{kind: frozen, model: {t5}, view: {view}}}", loss="forward_kl", tokenizer=t5)
    done = cli("run", recipe, "teachers.big.view.exemplars=gone", expect=2)
    assert "teachers.big.view.exemplars 'gone': no such file" in done.stderr
    assert not (tmp_path / "runs").exists()
    (longest,) = re.findall(r"teacher big: reads up to (\d+) tokens a row", cli("run", recipe).stdout)
    assert int(longest) > 150  # two worked questions of five choices before each
    assert _steps(tmp_path) == {"student": 6}


def test_the_student_s_average_is_told_the_gold_label(cli: Any, sample: Any, tmp_path: Path) -> None:
    view = "{template: '{input}', gold_label: true}"
    cli("run", sample(teacher=f"{{kind: ema, decay: 0.9, view: {view}}}", loss="reverse_kl"))
    assert _steps(tmp_path) == {"student": 6}
