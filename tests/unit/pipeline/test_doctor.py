"""What a recipe's examination finds, on recipes that are ill in one way each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill_llm.pipeline import first_step
from distill_llm.pipeline.diagnosis import Diagnosis
from distill_llm.pipeline.doctor import examine
from distill_llm.recipe.load import parse_yaml, recipe_from

YAML = """
name: tiny
run_dir: DIR/run
task: {kind: shop, products: 20, train_size: 32, validation_size: 8, test_size: 8}
rationales: {teacher: {kind: gold}}
student:
  config: {model_type: t5, d_model: 8, d_kv: 4, d_ff: 16, num_layers: 1, num_heads: 2}
  tokenizer: {kind: words, vocab_size: 256}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}
train: {max_steps: 2, rows_per_step: 8, rows_per_batch: 8}
"""


def _examined(folder: Path, *overrides: str) -> Diagnosis:
    return examine(recipe_from(parse_yaml(YAML.replace("DIR", str(folder)), "test"), overrides))


def _said(diagnosis: Diagnosis, what: str) -> list[tuple[str, str]]:
    return [(finding.level, finding.said) for finding in diagnosis.findings if finding.what == what]


def test_a_sound_recipe_may_run_and_nothing_is_written(tmp_path: Path) -> None:
    diagnosis = _examined(tmp_path)
    assert diagnosis.may_run
    assert list(tmp_path.iterdir()) == []
    assert [(facts.name, facts.tokens) for facts in diagnosis.terms] == [("label", 8), ("rationale", 68)]
    assert all(facts.gradient_norm > 0 for facts in diagnosis.terms)
    # random weights know nothing: each token is about as likely as any other
    vocabulary = next(facts.loss for facts in diagnosis.terms if facts.name == "label")
    assert vocabulary == pytest.approx(torch.tensor(60.0).log().item(), rel=0.5)


def test_a_row_shows_what_is_read_and_each_token_that_is_learned(tmp_path: Path) -> None:
    label, rationale = sorted(_examined(tmp_path).rows[:2], key=len)
    assert label.startswith("predict : ")
    assert label.count("|") == 3  # a name and the end of the text
    assert label.endswith("</s>|")
    assert rationale.startswith("explain : ")
    assert rationale.count("|") > 10


def test_cut_inputs_are_a_warning_with_the_share_and_the_key(tmp_path: Path) -> None:
    diagnosis = _examined(tmp_path, "train.max_input_tokens=8", "train.max_target_tokens=4")
    assert diagnosis.may_run
    ((level, said),) = _said(diagnosis, "inputs")
    assert (level, said) == ("warning", "64 of 64 are cut (100.0%) by train.max_input_tokens=8")
    ((level, said),) = _said(diagnosis, "targets")
    assert (level, said) == ("warning", "32 of 64 are cut (50.0%) by train.max_target_tokens=4")


def test_what_the_recipe_names_and_nobody_has_is_an_error(tmp_path: Path) -> None:
    diagnosis = _examined(tmp_path, "student.model=./nowhere", "student.config={}", "student.tokenizer=''")
    assert not diagnosis.may_run
    assert any("there is no folder './nowhere'" in said for _, said in _said(diagnosis, "recipe"))


def test_a_chat_without_a_template_is_an_error(tmp_path: Path) -> None:
    diagnosis = _examined(tmp_path, "student.chat=true")
    assert not diagnosis.may_run
    assert any("no chat template" in said for _, said in _said(diagnosis, "recipe"))


class _Unsteady:
    """A teacher whose dropout was left on."""

    def signals(self, batch: dict[str, Any]) -> Any:
        from distill_llm.core.signals import signals_of

        return signals_of(torch.rand(*batch["labels"].shape, 9), batch)


class _Learning:
    """A teacher whose weights would be trained."""

    def signals(self, batch: dict[str, Any]) -> Any:
        from distill_llm.core.signals import signals_of

        return signals_of(torch.ones(*batch["labels"].shape, 9, requires_grad=True), batch)


@pytest.mark.parametrize(("teacher", "said"), [(_Unsteady(), "asked twice"), (_Learning(), "carry a gradient")])
def test_a_teacher_that_is_not_still_is_an_error(
    teacher: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_step, "open_teachers", lambda recipe, terms, student: {"big": teacher})
    diagnosis = _examined(tmp_path)
    assert not diagnosis.may_run
    ((level, found),) = _said(diagnosis, "teacher big")
    assert level == "error"
    assert said in found


def test_a_micro_batch_by_tokens_is_as_large_as_the_longest_rows_let_it_be(tmp_path: Path) -> None:
    by_rows, by_tokens = _examined(tmp_path), _examined(tmp_path, "train.tokens_per_batch=120")
    assert "one micro-batch of 8 rows" in _said(by_rows, "memory")[0][1]
    ((_, said),) = _said(by_tokens, "memory")
    assert "one micro-batch of 3 rows" in said


def _with_view(folder: Path, tiny: Any, view: str, targets: str) -> Diagnosis:
    words = "predict explain : buys and . who pays more ? so the answer is + = > < hint ( ) q a"
    big = tiny(text=f"{words} {' '.join(map(str, range(41)))}", tokenizer="bytes_bpe")
    big.model.save_pretrained(folder / "big")
    big.tokenizer.save_pretrained(folder / "big")
    soft = f"{{name: soft, loss: {{kind: universal_logit}}, targets: {targets}, teacher: big}}"
    teacher = f"teachers={{big: {{kind: frozen, model: {folder}/big, own_tokenizer: true, view: {view}}}}}"
    label = "{name: label, loss: {kind: cross_entropy}, targets: [label]}"
    return _examined(folder, teacher, f"objective=[{label}, {soft}]")


def test_a_view_is_shown_with_what_has_no_counterpart(tmp_path: Path, tiny_llama: Any) -> None:
    diagnosis = _with_view(tmp_path, tiny_llama, "{template: '{prompt}', gold_label: true}", "[rationale]")
    assert diagnosis.may_run
    (level, facts), (_, shown) = _said(diagnosis, "view of big")
    assert level == "ok"
    assert facts.startswith("reads up to ")
    assert "who pays more ?" in shown
    assert "\n(Hint: so " in shown
    assert [facts.tokens for facts in diagnosis.terms] == [8, 68]
    assert all(facts.gradient_norm > 0 for facts in diagnosis.terms)


def test_a_teacher_that_is_told_what_it_is_asked_is_a_warning(tmp_path: Path, tiny_llama: Any) -> None:
    diagnosis = _with_view(tmp_path, tiny_llama, "{gold_label: true}", "[label, rationale]")
    assert diagnosis.may_run
    level, said = _said(diagnosis, "view of big")[-1]
    assert level == "warning"
    assert "it can only repeat it" in said
