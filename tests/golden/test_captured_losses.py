"""Losses from captured log-probabilities, against the teacher's own forward pass over prompt and completion in float64.

p is the teacher's distribution behind its few-shot prompt, q the student's; all words that were not captured are one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from distill_llm.core.errors import ConfigError, DataError
from distill_llm.core.sparse import TopSignals
from distill_llm.data.rows import Row
from distill_llm.models.head import OutputHead
from distill_llm.models.load import LoadedModel, build_student, read_tokenizer
from distill_llm.models.prompt_tokens import prompt_ids
from distill_llm.objective import Objective
from distill_llm.pipeline.capture_stage import write_captures
from distill_llm.pipeline.rationale_stage import Material, make_asker
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.student_stage import Plan
from distill_llm.pipeline.trial import open_teachers
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe
from distill_llm.training.train import collator_for
from tests.conftest import LLAMA_SIZES, T5_SIZES

K = 4
YAML = """
name: tiny
task: {kind: shop, products: 20, train_size: 6, validation_size: 2, test_size: 2}
rationales:
  teacher: {kind: transformers, model: TEACHER}
  prompt: {exemplars: FOLDER/shots.yaml}
  sampling: {temperature: 1.0, top_p: 0.9, max_new_tokens: 9, top_logprobs: 4}
  samples: 3
  keep: []
student: {config: {}, tokenizer: TEACHER}
teachers: {heard: {kind: captured}}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: soft, loss: {kind: forward_kl}, targets: [rationale], teacher: heard}
train: {max_steps: 2, rows_per_step: 8, rows_per_batch: 4, max_target_tokens: 32}
evaluate: {controls: [], teacher: false}
"""
TEXT = "ann bob carl dora emil fay gus hana buys and who pays more ? . + = > < predict : explain : 1 2 3 4 5 6 7 8 9 so"
SHOTS = """
- {question: "ann buys 1 . who pays more ?", rationale: "ann buys 1 .", answer: "so ann"}
- {question: "bob buys 2 . who pays more ?", rationale: "2 > 1 .", answer: "so bob"}
"""
SIZES = {"t5": T5_SIZES, "llama": LLAMA_SIZES}


@dataclass
class Made:
    """A recipe with its rationales, its rows, its student and the teacher of text."""

    recipe: Recipe
    run: RunFolder
    material: Material
    plan: Plan
    student: LoadedModel
    teacher: LoadedModel

    def write(self) -> Any:
        (report,) = write_captures(self.recipe, self.plan.rows.rows, self.material.splits.train, self.run)
        return report

    @property
    def heard(self) -> list[Row]:
        return [row for row in self.plan.rows.rows if row.target == "rationale"]


@pytest.fixture
def made(planned: Any, tmp_path: Path, tiny_t5: Any, tiny_llama: Any) -> Callable[..., Made]:
    def build(teacher: str, student: str, *overrides: str) -> Made:
        wide = {"d_model": 32} if teacher == "t5" else {"hidden_size": 32}
        own = {"t5": tiny_t5, "llama": tiny_llama}[teacher](text=TEXT, seed=5, **wide)
        with torch.no_grad():
            for weight in own.model.parameters():
                weight.add_(torch.randn_like(weight) * 0.1)
        own.model.save_pretrained(tmp_path / "teacher")
        own.tokenizer.save_pretrained(tmp_path / "teacher")
        (tmp_path / "shots.yaml").write_text(SHOTS)
        text = YAML.replace("TEACHER", str(tmp_path / "teacher")).replace("FOLDER", str(tmp_path))
        data = parse_yaml(text, "tiny")
        data["student"]["config"] = SIZES[student]
        recipe = recipe_from(data, [f"run_dir={tmp_path / 'run'}", *overrides])
        run, material, plan = planned(recipe)
        torch.manual_seed(3)
        built = build_student(recipe.student, read_tokenizer(str(run.tokenizer), where="test"))
        built.model.eval()
        return Made(recipe, run, material, plan, built, own)

    return build


def _by_hand(made: Made) -> tuple[float, int]:
    """The sum of KL on K words and the rest over matched tokens, and their number; words are told apart by text."""
    recipe, tokenizer, special = made.recipe, made.student.tokenizer, set(made.teacher.tokenizer.all_special_ids)
    assert recipe.rationales is not None
    asker = make_asker(recipe, recipe.rationales)
    written = {line["key"]: line for line in map(json.loads, made.run.journal().read_text().splitlines())}
    total, matched = torch.zeros((), dtype=torch.float64), 0
    teacher, student = made.teacher.model.double(), made.student.model.double()
    for row in made.heard:
        requests = asker.requests(made.material.splits.train[row.example], "train")
        body = list(row.label_ids)
        body = body[:-1] if body[-1] == tokenizer.eos_token_id else body
        found = [
            (request, written[request.key]["scores"]["tokens"])
            for request in requests
            if [token for token in written[request.key]["scores"]["tokens"] if token not in special] == body
        ]
        request, tokens = found[0]
        places = [place for place, token in enumerate(tokens) if token not in special]
        with torch.no_grad():
            p = _after(teacher, prompt_ids(made.teacher.tokenizer, request.prompt), tokens)[places]
            q = _after(student, list(row.input_ids), body)
        top = p.topk(K)
        log_p = torch.cat([top.values.log(), (1 - top.values.sum(-1, keepdim=True)).log()], -1)
        kept = q.gather(-1, top.indices)
        log_q = torch.cat([kept.log(), (1 - kept.sum(-1, keepdim=True)).log()], -1)
        total += (log_p.exp() * (log_p - log_q)).sum()
        matched += len(places)
    made.student.model.float()
    return float(total), matched


def _after(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The distribution [T V] from which each of ``tokens`` is taken."""
    if model.config.is_encoder_decoder:
        begin = [model.config.decoder_start_token_id, *tokens[:-1]]
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([begin])).logits[0]
    else:
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return logits.softmax(-1)


def _by_recipe(made: Made, chunk_tokens: int, size: int) -> float:
    """The soft term over all rows, ``size`` at a time."""
    objective = Objective(made.recipe.objective)
    teachers, collator = open_teachers(made.recipe, objective.terms, made.student), collator_for(made.student)
    rows = made.plan.rows.rows
    batches = [collator(rows[start : start + size]) for start in range(0, len(rows), size)]
    counts = torch.stack([objective.counts(batch) for batch in batches]).sum(0)
    total = 0.0
    for batch in batches:
        head = OutputHead(made.student.model, chunk_tokens=chunk_tokens) if chunk_tokens else None
        ((said, taught),) = made.recipe.scheme.compare(made.student.model, teachers, batch, objective, head)
        total += float(objective(said, taught, counts)[1]["soft"])
    return total


@pytest.mark.parametrize(("teacher", "student"), [("t5", "t5"), ("llama", "llama"), ("llama", "t5")])
def test_the_loss_is_that_of_the_teachers_own_pass(made: Callable[..., Made], teacher: str, student: str) -> None:
    it = made(teacher, student)
    report = it.write()
    total, matched = _by_hand(it)
    tokens = sum(len(row.label_ids) for row in it.heard)
    assert len({(row.example, tuple(row.label_ids)) for row in it.heard}) > 6, "an example has several"
    assert 0 < matched < tokens
    assert report.known == pytest.approx(matched / tokens)
    for chunk_tokens, size in ((0, 100), (0, 5), (5, 3)):
        assert _by_recipe(it, chunk_tokens, size) == pytest.approx(total / tokens, rel=2e-3)


def test_the_labels_words_are_not_matched_where_the_label_is_another(made: Callable[..., Made]) -> None:
    """`rationale_then_label`: the rationale's tokens are the teacher's, what the data says behind it is not."""
    it = made("llama", "llama", "objective.soft.targets=[rationale_then_label]")
    assert it.write().known is not None
    rows = [row for row in it.plan.rows.rows if row.target == "rationale_then_label"]
    teacher: Any = open_teachers(it.recipe, it.recipe.objective, it.student)["heard"]
    for row in rows:
        said = teacher.signals(collator_for(it.student)([row]))
        assert isinstance(said, TopSignals)
        assert said.known is not None
        text = it.student.tokenizer.decode(list(row.label_ids), skip_special_tokens=True)
        answers = [answer for answer in it.material.answers.values() for answer in answer.rationales]
        own = max((answer for answer in answers if text.startswith(answer)), key=len)
        inside = len(it.student.tokenizer(own, add_special_tokens=False)["input_ids"])
        assert said.known[:inside].all()
        assert not said.known[inside:].any()


def test_it_is_written_once_and_anew_for_other_rationales(made: Callable[..., Made]) -> None:
    it = made("t5", "t5")
    first, again = it.write(), it.write()
    assert (first.there, again.there) == (0, first.rows)
    assert first.known == again.known
    shard = next(first.folder.glob("shard-*"))
    fewer = made("t5", "t5", "rationales.keep=[{kind: shortest}]")
    report = fewer.write()
    assert report.there == 0
    assert report.rows < first.rows
    assert not shard.exists()


def test_another_tokenizer_is_refused(made: Callable[..., Made]) -> None:
    it = made("t5", "t5", "student.tokenizer={kind: words, vocab_size: 64}")
    with pytest.raises(ConfigError, match=r"teachers\.heard: .*different vocabularies .*student\.tokenizer"):
        it.write()


def test_rationales_that_share_no_token_are_refused(made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    it = made("t5", "t5")
    monkeypatch.setattr("distill_llm.pipeline.capture_stage.places_in_completion", lambda ids, *_: [-1] * len(ids))
    with pytest.raises(DataError, match=r"teachers\.heard: no token .* begins with \['.*, the completion with \['"):
        it.write()


def test_a_cache_of_that_name_is_not_overwritten(made: Callable[..., Made]) -> None:
    from distill_llm.cache.manifest import read_manifest, write_manifest

    it = made("t5", "t5")
    folder = it.write().folder
    manifest = read_manifest(folder)
    assert manifest is not None
    write_manifest(folder, manifest | {"payload": {"kind": "top_k", "k": 4}})
    with pytest.raises(ConfigError, match=r"payload\.kind: 'top_k' there, 'captured' here"):
        it.write()
