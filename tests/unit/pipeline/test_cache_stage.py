"""Caches of signals: what they say is what the teacher says, interrupted or not; what does not fit is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from distill_llm.cache.shards import ShardWriter
from distill_llm.core.errors import ConfigError, StorageError
from distill_llm.core.progress import SILENT
from distill_llm.core.signals import LazySignals
from distill_llm.core.sparse import TopSignals
from distill_llm.data.rows import Row
from distill_llm.models.head import OutputHead
from distill_llm.models.load import LoadedModel, build_student, read_tokenizer
from distill_llm.objective import Objective
from distill_llm.pipeline import cache_stage
from distill_llm.pipeline.cache_stage import CacheReport, require_caches, write_caches
from distill_llm.pipeline.doctor import examine
from distill_llm.pipeline.run import cache_signals, student_trainer, train
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.student_stage import Plan
from distill_llm.pipeline.trial import open_teachers
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.frozen import Frozen
from distill_llm.training.train import collator_for

YAML = """
name: tiny
task: {kind: shop, products: 20, train_size: 12, validation_size: 4, test_size: 4}
rationales: {teacher: {kind: gold}}
student: {config: {}, tokenizer: TEACHER}
teachers:
  big: {kind: frozen, model: TEACHER}
  kept: {kind: cached, of: big, shard_megabytes: 0.0005}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}
  - {name: soft, loss: {kind: forward_kl, temperature: 2.0}, targets: [label, rationale], teacher: kept}
train: {max_steps: 2, rows_per_step: 8, rows_per_batch: 4, max_target_tokens: 32}
evaluate: {controls: []}
"""
TEXT = "ann bob carl dora emil fay gus hana buys and who pays more ? . + = > < predict : explain : 1 2 3 4 5 6 7 8 9"


@dataclass
class Made:
    """A recipe with its rows and its student."""

    recipe: Recipe
    plan: Plan
    run: RunFolder
    student: LoadedModel

    @property
    def rows(self) -> Sequence[Row]:
        return self.plan.rows.rows

    def write(self) -> CacheReport:
        (report,) = write_caches(self.recipe, self.rows, self.run, SILENT)
        return report

    def teachers(self, name: str = "kept") -> dict[str, Any]:
        """What the recipe's terms ask, with teacher ``name`` behind the cached one's."""
        terms = [term.model_copy(update={"teacher": term.teacher and name}) for term in self.recipe.objective]
        return {"kept": open_teachers(self.recipe, terms, self.student)[name]}


@pytest.fixture(params=["t5", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def made(family: str, planned: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Made]:
    """Plans the recipe with overrides; the teacher is twice as wide as the student, and louder than a fresh one."""
    tiny = request.getfixturevalue(f"tiny_{family}")
    wide = {"d_model": 32} if family == "t5" else {"hidden_size": 32}
    teacher = tiny(text=TEXT, seed=5, **wide)
    with torch.no_grad():
        for weight in teacher.model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    teacher.model.save_pretrained(tmp_path / "teacher")
    teacher.tokenizer.save_pretrained(tmp_path / "teacher")
    sizes = {key: value for key, value in tiny(text=TEXT).model.config.to_diff_dict().items() if _is_size(key)}

    def build(*overrides: str) -> Made:
        data = parse_yaml(YAML.replace("TEACHER", str(tmp_path / "teacher")), "tiny")
        data["student"]["config"] = {"model_type": family, **sizes}
        recipe = recipe_from(data, [f"run_dir={tmp_path / 'run'}", *overrides])
        run, _, plan = planned(recipe)
        torch.manual_seed(3)
        student = build_student(recipe.student, read_tokenizer(str(run.tokenizer), where="test"))
        student.model.eval()
        return Made(recipe, plan, run, student)

    return build


def _is_size(key: str) -> bool:
    return key in (
        "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "dropout_rate", "hidden_size", "intermediate_size",
        "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
    )  # fmt: skip


def _outcome(made: Made, teachers: dict[str, Any], chunk_tokens: int, cuts: Sequence[int]) -> list[torch.Tensor]:
    """Loss and gradients of one step over rows in a shuffled order, cut to micro-batches at ``cuts``."""
    rows = random.Random(1).sample(list(made.rows), 8)
    collator, objective = collator_for(made.student), Objective(made.recipe.objective)
    parts = [rows[a:b] for a, b in zip((0, *cuts), (*cuts, len(rows)), strict=True)]
    batches = [collator(part) for part in parts]
    counts = torch.stack([objective.counts(batch) for batch in batches]).sum(0)
    made.student.model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        head = OutputHead(made.student.model, chunk_tokens=chunk_tokens) if chunk_tokens else None
        ((said, taught),) = made.recipe.scheme.compare(made.student.model, teachers, batch, objective, head)
        loss, _ = objective(said, taught, counts)
        loss.backward()
        total += loss.detach()
    return [total, *(w.grad.clone() for w in made.student.model.parameters() if w.grad is not None)]


def _close(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], size: float) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=size, rtol=size)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_last_hidden_teaches_what_the_teacher_itself_teaches(
    made: Callable[..., Made], dtype: str, size: float
) -> None:
    it = made(f"teachers.kept.payload={{kind: last_hidden, dtype: {dtype}}}")
    it.write()
    for chunk_tokens in (0, 5):
        online = _outcome(it, it.teachers("big"), chunk_tokens, [])
        found = _outcome(it, it.teachers(), chunk_tokens, [])
        _close(found, online, size)
        assert not torch.equal(found[0], online[0]) or dtype == "float32"
    batch = collator_for(it.student)(it.rows[:4])
    said = it.teachers()["kept"].lazy_signals(batch)
    assert isinstance(said, LazySignals)
    assert said.hidden.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("payload", ["{kind: top_k, k: 4}", "{kind: sampled}", "{kind: last_hidden}"])
def test_a_step_does_not_depend_on_its_cuts_or_on_chunks(made: Callable[..., Made], payload: str) -> None:
    it = made(f"teachers.kept.payload={payload}")
    it.write()
    teachers = it.teachers()
    whole = _outcome(it, teachers, 0, [])
    for chunk_tokens in (0, 5):
        for cuts in ([4], [2, 4, 6], [1, 2, 3, 4, 5, 6, 7], [3, 7]):
            _close(_outcome(it, teachers, chunk_tokens, cuts), whole, 5e-6)


def test_rows_are_hashed_where_a_teacher_finds_them_by_it_alone(made: Callable[..., Made]) -> None:
    it = made()
    it.write()
    kept, online = (collator_for(it.student, it.teachers(name))(it.rows[:2]) for name in ("kept", "big"))
    assert kept["keys"].tolist() == [row.key for row in it.rows[:2]]
    assert "keys" not in online
    assert kept.keys() - online.keys() == {"keys"}


def test_top_k_are_the_teachers_likeliest_words(made: Callable[..., Made]) -> None:
    """In the order of the batch's tokens, and with the rest at the term's own temperature."""
    it = made("teachers.kept.payload={kind: top_k, k: 4}")
    report = it.write()
    batch = collator_for(it.student)(random.Random(2).sample(list(it.rows), 6))
    said, online = it.teachers()["kept"].signals(batch), it.teachers("big")["kept"].signals(batch)
    assert isinstance(said, TopSignals)
    top = online.logits.topk(4)
    assert torch.equal(said.token_ids, online.token_ids)
    assert torch.equal(said.word_ids, top.indices)
    log_p = (online.logits / 2.0).log_softmax(-1)
    rest = 1 - log_p.gather(-1, top.indices).exp().sum(-1)
    found = said.log_coarse(2.0).exp()
    torch.testing.assert_close(found[:, :-1], log_p.gather(-1, top.indices).exp(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[:, -1], rest, atol=1e-3, rtol=1e-3)
    assert report.captured_mass is not None
    masses = [it.teachers("big")["kept"].signals(collator_for(it.student)([row])).logits for row in it.rows]
    mass = torch.cat(masses).softmax(-1).topk(4).values.sum(-1).mean()
    assert report.captured_mass == pytest.approx(float(mass), rel=1e-3)
    assert report.rows == 24
    assert report.tokens == sum(len(row.label_ids) for row in it.rows)


def test_only_rows_of_the_terms_that_ask_are_written(made: Callable[..., Made]) -> None:
    it = made("objective.soft.targets=[label]")
    assert it.write().rows == 12
    assert _outcome(it, it.teachers(), 5, [3])[0] > 0, "rationale rows are in the batch, and are not looked up"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that were computed, one entry a row."""
    keys: list[int] = []
    add = ShardWriter.add

    def counted(self: ShardWriter, key: int, columns: Any) -> None:
        keys.append(key)
        add(self, key, columns)

    monkeypatch.setattr(ShardWriter, "add", counted)
    return keys


@pytest.mark.parametrize("payload", ["{kind: top_k, k: 4}", "{kind: sampled}"])
@pytest.mark.parametrize("family", ["t5"], indirect=True)
def test_an_interrupted_cache_goes_on_and_says_the_same(
    made: Callable[..., Made], computed: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, payload: str
) -> None:
    outcomes = []
    for folder in (tmp_path / "whole", tmp_path / "torn"):
        it = made(f"teachers.kept.payload={payload}", f"teachers.kept.folder={folder}")
        if folder.name == "torn":
            columns, calls = cache_stage._columns, []

            def interrupted(*arguments: Any, columns: Any = columns, calls: list[int] = calls) -> Any:
                calls.append(1)
                if len(calls) == 3:
                    raise KeyboardInterrupt
                return columns(*arguments)

            monkeypatch.setattr(cache_stage, "_columns", interrupted)
            with pytest.raises(KeyboardInterrupt):
                it.write()
            with pytest.raises(ConfigError, match=r"teachers\.kept: the cache in .*torn lacks 16 of 24 rows\. First"):
                require_caches(it.recipe, it.rows, it.run)
            monkeypatch.setattr(cache_stage, "_columns", columns)
        computed.clear()
        report = it.write()
        assert (report.rows, report.there) == (24, 8 if folder.name == "torn" else 0)
        assert len(computed) == report.rows - report.there
        require_caches(it.recipe, it.rows, it.run)
        outcomes.append(_outcome(it, it.teachers(), 5, []))
    _close(outcomes[0], outcomes[1], 1e-6)


@pytest.mark.parametrize("family", ["t5"], indirect=True)
def test_a_damaged_shard_is_refused_and_only_it_is_written_again(
    made: Callable[..., Made], computed: list[int]
) -> None:
    it = made()
    it.write()
    assert len(computed) == 24
    shards = sorted(it.run.signals("kept").glob("shard-*"))
    assert len(shards) > 4
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    for use in (lambda: require_caches(it.recipe, it.rows, it.run), it.write, it.teachers):
        with pytest.raises(StorageError, match=rf"{shards[1].name}: this shard of the cache is damaged"):
            use()
    shards[1].unlink()
    computed.clear()
    it.write()
    assert 0 < len(computed) < 12
    assert (sorted(it.run.signals("kept").glob("shard-*"))) == shards, "the same rows give the same bytes"


@pytest.mark.parametrize("family", ["t5"], indirect=True)
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("teachers.kept.payload={kind: top_k, k: 5}", r"payload\.k: 32 there, 5 here"),
        ("objective.soft.loss.temperature=3.0", r"temperatures: \[2\.0\] there, \[3\.0\] here"),
        ("teachers.big.dtype=bfloat16", r"teacher\.dtype: 'auto' there, 'bfloat16' here"),
    ],
)
def test_a_cache_of_another_recipe_is_refused(made: Callable[..., Made], override: str, said: str) -> None:
    made().write()
    it = made(override)
    for use in (lambda: require_caches(it.recipe, it.rows, it.run), it.write):
        with pytest.raises(ConfigError, match=rf"(?s)this cache of signals was made otherwise.*{said}"):
            use()


@pytest.mark.parametrize("family", ["t5"], indirect=True)
def test_another_teacher_in_the_same_folder_is_noticed(made: Callable[..., Made], tmp_path: Path) -> None:
    made().write()
    (weights,) = (tmp_path / "teacher").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ConfigError, match=r"teacher\.weights: 'folder@\w+' there, 'folder@\w+' here"):
        made().write()


@pytest.mark.parametrize("family", ["t5"], indirect=True)
def test_a_folder_of_something_else_is_refused(made: Callable[..., Made], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"teachers\.kept\.folder: .*notes exists, is not empty, and is not a cache"):
        made(f"teachers.kept.folder={tmp_path / 'notes'}").write()


@pytest.mark.parametrize("family", ["t5"], indirect=True)
@pytest.mark.parametrize("payload", ["{kind: top_k}", "{kind: last_hidden}"])
def test_training_does_not_open_the_teacher(
    made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, payload: str
) -> None:
    override = f"teachers.kept.payload={payload}"
    it = made(override)
    with pytest.raises(ConfigError, match=r"lacks 24 of 24 rows. First type: distill-llm cache-signals RECIPE"):
        train(it.recipe)
    cache_signals(it.recipe)

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("the teacher was opened")

    monkeypatch.setattr(Frozen, "open", fail)
    assert train(it.recipe).trained_arms() == ["student"]


class _Logged(TrainerCallback):
    """Keeps what reporters get."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.entries.append(dict(logs))


@pytest.mark.parametrize("family", ["t5"], indirect=True)
@pytest.mark.parametrize("payload", ["{kind: top_k, k: 4}", "{kind: sampled}", "{kind: last_hidden, dtype: float32}"])
def test_training_logs_of_a_cached_teacher_are_those_of_the_teacher(
    made: Callable[..., Made], tmp_path: Path, payload: str
) -> None:
    """All rows in one step: agreement is the online teacher's, the mass that of the report."""
    steps = ("train.max_steps=1", "train.rows_per_step=24", "train.rows_per_batch=8", "train.validate_every=1")
    entries = []
    for teacher in ("kept", "big"):
        own = (f"objective.soft.teacher={teacher}", f"run_dir={tmp_path / teacher}")
        it = made(f"teachers.kept.payload={payload}", *steps, *own)
        if teacher == "kept":
            report = it.write()
        trainer = student_trainer(it.recipe)
        logged = _Logged()
        trainer.add_callback(logged)
        trainer.train()
        entries.append(next(entry for entry in logged.entries if "loss_soft" in entry))
    kept, online = entries
    assert kept["agreement_soft"] == pytest.approx(online["agreement_soft"])
    assert kept["loss_label"] == pytest.approx(online["loss_label"], rel=1e-5)
    if "top_k" in payload:
        assert report.captured_mass is not None
        assert kept.pop("captured_mass_soft") == pytest.approx(report.captured_mass, rel=1e-4)
        assert kept["teacher_entropy_soft"] < online["teacher_entropy_soft"]
        assert 0 < kept["loss_soft"] < online["loss_soft"]
    if "last_hidden" in payload:
        assert kept["loss_soft"] == pytest.approx(online["loss_soft"], rel=1e-5)
        assert kept["teacher_entropy_soft"] == pytest.approx(online["teacher_entropy_soft"], rel=1e-5)
    assert "captured_mass_soft" not in kept


@pytest.mark.parametrize("family", ["t5"], indirect=True)
def test_a_recipe_without_a_cached_teacher_has_nothing_to_write(made: Callable[..., Made]) -> None:
    it = made("objective.soft.teacher=big", "teachers.kept={kind: ema}")
    with pytest.raises(ConfigError, match=r"no teacher of `kind: cached` or `captured` among \['big', 'kept'\]"):
        cache_signals(it.recipe)


@pytest.mark.parametrize("family", ["t5"], indirect=True)
def test_doctor_says_how_the_cache_stands(made: Callable[..., Made]) -> None:
    it = made()

    def finding() -> tuple[str, str]:
        diagnosis = examine(it.recipe)
        ((level, said),) = [(one.level, one.said) for one in diagnosis.findings if one.what == "cache kept"]
        assert diagnosis.may_run == (level != "error")
        assert {facts.name for facts in diagnosis.terms} == {"label", "rationale", "soft"}
        assert all(facts.loss > 0 for facts in diagnosis.terms)
        return level, said

    assert finding()[0] == "warning"
    assert "lacks 24 of 24 rows" in finding()[1]
    it.write()
    assert finding() == ("ok", f"{it.run.signals('kept')} is that of the recipe, undamaged, and has all of 24 rows")
    it = made("teachers.kept.payload={kind: sampled}")
    assert finding()[0] == "error"
    assert "payload.kind: 'top_k' there, 'sampled' here" in finding()[1]


@pytest.mark.parametrize("family", ["t5"], indirect=True)
def test_a_cached_teacher_costs_one_pass_in_the_controls_compute(made: Callable[..., Made]) -> None:
    """10 passes over the rows: beside the student it is run ten times, from a cache once."""
    more = ("train.max_steps=30", "evaluate.controls=[labels_same_compute]")
    factors = {}
    for teacher in ("kept", "big"):
        plan = made(*more, f"objective.soft.teacher={teacher}").plan
        factors[teacher] = plan.arms[1].max_steps / 30
    plain = made(*more, "objective.soft.loss={kind: cross_entropy}", "objective.soft.teacher=null").plan
    base = plain.arms[1].max_steps / 30
    assert base < factors["kept"] < factors["big"]
    assert factors["kept"] - base == pytest.approx((factors["big"] - base) / 10, abs=0.06)
