"""What a recipe may ask of on-policy distillation, and what is refused when it loads, with the reason."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest

from distill_llm.core.errors import ConfigError
from distill_llm.data.rows import Row
from distill_llm.pipeline.arms import Sizes, plan_arms
from distill_llm.pipeline.views import check_room, repeaters
from distill_llm.recipe.load import parse_yaml, recipe_from

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill_llm.models.load import LoadedModel
    from distill_llm.recipe.recipe import Recipe

YAML = """
name: tiny
task: {kind: shop}
rationales: {teacher: {kind: gold}}
student:
  config: {model_type: llama}
  tokenizer: {kind: words}
teachers:
  big: {kind: frozen, model: a/b}
  disk: {kind: cached, of: big}
  pair: {kind: ensemble, of: [big, foreign]}
  foreign: {kind: frozen, model: a/c}
  own: {kind: ema, decay: 0, view: {rationale: true}}
scheme: {kind: on_policy}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}
  - {name: soft, loss: {kind: forward_kl}, targets: [rationale], teacher: big}
train: {max_steps: 100, rows_per_step: 4, rows_per_batch: 4}
"""
TRL = (
    "scheme={kind: on_policy, engine: trl, student_fraction: 1}",
    "objective=[{name: soft, loss: {kind: jensen_shannon, mixture: 0.9}, targets: [rationale], teacher: big}]",
)


def _recipe(*overrides: str) -> Recipe:
    return recipe_from(parse_yaml(YAML, "tiny"), overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("objective.soft.teacher=disk",), "written down before, and the student writes others"),
        (
            ("teachers.foreign.own_tokenizer=true", "objective.soft.loss={kind: universal_logit}",
             "objective.soft.teacher=foreign", "teachers.pair.of=[big, own]"),
            "a tokenizer of its own, whose tokens are laid beside",
        ),
        (("objective.label={name: more, loss: {kind: forward_kl}, targets: [label], teacher: disk}",
          "objective.rationale={name: other, loss: {kind: reverse_kl}, targets: [rationale], teacher: disk}",
          "teachers.disk.payload={kind: last_hidden}", "scheme.targets=[label]"),
         "'disk': what it says of the data's texts"),
        (("scheme.targets=[label]",), r"no term asks a teacher about \['label'\]"),
        (("objective.soft={name: soft, loss: {kind: cross_entropy}, targets: [label]}",), "no term asks a teacher"),
        (("scheme.vllm={}",), "it writes for engine: trl alone"),
        (("scheme.student_fraction=1.5",), "less than or equal to 1"),
        (("scheme.student_fraction={start: 0, end: 2}",), "a share is at most 1, and this schedule goes from 0 to 2"),
        (("rationales=null", "objective=[{name: label, loss: {kind: cross_entropy}, targets: [label]}]"),
         r"teachers\.own\.view\.rationale: the recipe has no `rationales` section"),
    ],
)  # fmt: skip
def test_what_cannot_follow_the_student_is_refused(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _recipe(*overrides)


def test_what_the_student_does_not_write_may_have_any_teacher() -> None:
    disk = "objective.label={name: more, loss: {kind: forward_kl}, targets: [label], teacher: disk}"
    with pytest.raises(ConfigError, match=r"keep scheme\.targets to others"):
        _recipe(disk)
    _recipe(disk, "scheme.targets=[rationale]")
    _recipe("objective.soft.teacher=disk", "scheme.student_fraction=0")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("scheme.student_fraction=0.5", "student_fraction: scheme.engine: trl has the student write all texts"),
        ("scheme.student_fraction=0", "has the student write all texts"),
        ("scheme.temperature=0", "has one temperature"),
        ("objective.soft.loss.temperature=2", "has one temperature, a number, for writing"),
        ("objective.soft.loss={kind: total_variation}", "knows forward_kl, reverse_kl and jensen_shannon alone"),
        ("objective.soft.weight={start: 1, end: 0}", "whose weight stays"),
        ("objective.soft.until=0.5", "every term ends"),
        ("objective.soft.row_weight=agreement", "counts all rows alike"),
        ("objective.soft.teacher=own", "has one teacher, a model of `kind: frozen`"),
        ("teachers.big.view={template: 'so: {input}'}", "shows its teacher what the student reads"),
        ("teachers.big.device=cuda", "keeps the teacher where the student is"),
        ("scheme.targets=[rationale, label]", "writes all rows of its term"),
        ("train.tokens_per_batch=4096", "cuts micro-batches by rows alone"),
        ("train.packing=always", "pads its rows"),
        ("train.chunk_tokens=64", "chooses its chunks itself"),
        ("evaluate.ablations={other: [soft]}", "of which nothing can be left out"),
        ("scheme.vllm={mode: server}", "`server` is the address for mode: server"),
    ],
)
def test_what_trl_cannot_do_is_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _recipe(*TRL, override)


def test_trl_knows_one_term() -> None:
    with pytest.raises(ConfigError, match=r"knows one divergence and nothing beside it, and there are 3 terms"):
        _recipe(TRL[0])
    found = _recipe(*TRL, "scheme.vllm={mode: server, server: 'http://here:8000'}", "scheme.temperature=2",
                    "objective.soft.loss.temperature=2", "objective.soft.weight=0.5")  # fmt: skip
    assert found.scheme.hands_over(found.objective)  # type: ignore[attr-defined]
    assert not found.scheme.hands_over([])  # type: ignore[attr-defined]


@pytest.mark.parametrize("package", ["trl", "vllm"])
def test_a_package_that_is_not_there_is_named_with_its_command(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    packages = {"trl": "there", "vllm": "there"} | {package: None}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: packages[name] if name in packages else find(name))
    with pytest.raises(ConfigError, match=rf"pip install 'distill-llm\[{package}\]'"):
        (recipe := _recipe(*TRL, "scheme.vllm={}")).scheme.check(recipe)


def test_trl_is_for_decoder_only_students(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_llm.schemes.trl_checks.need", lambda *_, **__: None)
    (recipe := _recipe(*TRL)).scheme.check(recipe)
    with pytest.raises(ConfigError, match="trains decoder-only students, and this is an encoder-decoder"):
        (recipe := _recipe(*TRL, "student.config.model_type=t5")).scheme.check(recipe)


# Tokens of a row (input and target): label 10 + 2, rationale 10 + 30.
ROWS = [Row(0, "label", [5] * 10, [1] * 2), Row(0, "rationale", [5] * 10, [1] * 30)]


def _steps(*overrides: str) -> int:
    sizes = {"big": 9000, "disk": 0, "pair": 0, "foreign": 0, "own": 1000}
    arms = plan_arms(_recipe(*overrides), ROWS, Sizes({"student": 1000}, sizes))
    return next(arm.max_steps for arm in arms if arm.name == "labels_same_compute")


def test_the_control_is_paid_for_what_the_student_wrote() -> None:
    """6 * 1000 for each token that it learns, 2 * 9000 of the teacher on rationales, and there 2 * 1000 a writing."""
    control = 12 * 6 * 1000
    plain = (12 * 6 * 1000 + 40 * (6 * 1000 + 2 * 9000)) / 2
    assert _steps("scheme={kind: step_by_step}") == _steps("scheme.student_fraction=0") == round(100 * plain / control)
    written = plain + 40 * 2 * 1000 * 0.5 / 2
    assert _steps() == round(100 * written / control)
    rising = plain + 40 * 2 * 1000 * 0.75 / 2  # half of the training on the way, and half at 1
    found = _steps("scheme.student_fraction={start: 0, end: 1, over: 0.5}")
    assert found == pytest.approx(100 * rising / control, abs=1)
    ends = (12 * 6 * 1000 + 40 * (6 * 1000 + 0.5 * 2 * 9000) + 40 * 2 * 1000 * 0.25) / 2
    assert _steps("objective.soft.until=0.5") == round(100 * ends / control)


def test_room_for_what_is_written(tiny_llama: Callable[..., LoadedModel], tiny_t5: Callable[..., LoadedModel]) -> None:
    recipe, small = _recipe("scheme.max_new_tokens=20"), tiny_llama(max_position_embeddings=24)
    with pytest.raises(ConfigError, match=r"20 tokens behind an input of 10 are more than the student takes \(24\)"):
        check_room(recipe, ROWS, small)
    check_room(recipe, ROWS[:1], small)  # labels are not written
    check_room(_recipe("scheme.max_new_tokens=14"), ROWS, small)
    check_room(recipe, ROWS, tiny_t5())


def test_who_is_told_the_rationale_repeats_it_unless_the_student_writes() -> None:
    asked: Any = "objective.soft.teacher=own"
    assert repeaters(_recipe(asked)) == []
    assert repeaters(_recipe(asked, "scheme={kind: step_by_step}")) == [("own", "rationale")]
