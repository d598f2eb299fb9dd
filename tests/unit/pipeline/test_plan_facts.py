"""What a changed recipe would train anew, and nothing else: named, set aside when wanted, and never deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_llm.core.errors import ConfigError
from distill_llm.core.files import write_json, write_text
from distill_llm.data.rows import Row
from distill_llm.pipeline.arms import Arm, Sizes, plan_arms
from distill_llm.pipeline.plan_facts import settle, write_plan
from distill_llm.pipeline.run_folder import RunFolder, claim
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe

YAML = """
name: tiny
task: {kind: shop}
rationales: {teacher: {kind: gold}}
student:
  config: {model_type: t5, d_model: 16}
  tokenizer: {kind: words}
teachers: {big: {kind: frozen, model: a/b}}
scheme:
  kind: assistant_chain
  teacher: big
  guidance: dense
  assistants: [{name: large, config: {d_model: 64}}, {name: middle, config: {d_model: 32}}]
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}
  - {name: soft, loss: {kind: forward_kl}, targets: [label], teacher: big}
train: {max_steps: 100, rows_per_step: 4, rows_per_batch: 4}
evaluate:
  controls: [labels_same_steps]
  ablations: {direct: [label, soft], text: [label, rationale]}
"""
ROWS = [Row(0, "label", [5] * 10, [1] * 2), Row(0, "rationale", [5] * 10, [1] * 30)]
ALL = ["direct", "labels_same_steps", "large", "middle", "student", "text"]


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    def build(*overrides: str, run: str = "run") -> Recipe:
        return recipe_from(parse_yaml(YAML, "tiny"), [f"run_dir={tmp_path / run}", *overrides])

    return build


def _arms(recipe: Recipe) -> list[Arm]:
    return plan_arms(recipe, ROWS, Sizes({stage.name: 10 for stage in recipe.stages}, {"big": 90, "models_above": 0}))


@pytest.fixture
def filled(recipe: Any) -> RunFolder:
    """A run folder in which all arms are trained, as far as files tell."""
    first = recipe()
    run, arms = claim(first), _arms(first)
    for arm in arms:
        write_plan(arm, first, arms, run)
        write_json(run.result(arm.name), {})
        write_text(run.predictions(arm.name), "{}\n")
    return run


def _anew(recipe: Recipe, run: RunFolder) -> list[str]:
    """What would be trained anew, by what the error says."""
    before = run.recipe.read_text()
    try:
        claim(recipe)
        settle(recipe, _arms(recipe), run, retrain=False)
    except ConfigError as error:
        assert run.recipe.read_text() == before, "a recipe that is refused is not written"
        (line,) = [line for line in str(error).split("\n") if line.startswith("These arms were planned otherwise")]
        return sorted(line.rpartition(": ")[2].rstrip(".").split(", "))
    assert yaml.safe_load(run.recipe.read_text()) == recipe.model_dump(mode="json")
    return []


@pytest.mark.parametrize(
    ("overrides", "anew"),
    [
        ([], []),
        (["train.workers=2", "train.report_to=[wandb]", "evaluate.batch_rows=3", "teachers.big.device=cpu"], []),
        (["teachers.other={kind: ema}", "evaluate.ablations.more=[label]"], []),
        (["scheme.assistants.middle.config.d_model=48"], ["middle", "student"]),
        (["scheme.assistants.large.config.d_model=48"], ["large", "middle", "student"]),
        (["student.config.d_model=8"], ["direct", "labels_same_steps", "student", "text"]),
        (["student.config.d_ff=8"], ALL),
        (["objective.soft.weight=2"], ["direct", "large", "middle", "student"]),
        (["objective.rationale.weight=2"], ["large", "middle", "student", "text"]),
        (["teachers.big.model=a/c"], ["direct", "large", "middle", "student"]),
        (["scheme.drop=0.5"], ["middle", "student"]),
        (["scheme.guidance=nearest"], ["middle", "student"]),
        (["train.learning_rate=1e-3"], ALL),
        (["train.max_steps=90"], ALL),
        (["train.max_input_tokens=9"], ALL),
        (["evaluate.ablations.text=[rationale]"], ["text"]),
    ],
    ids=str,
)
def test_what_depends_on_a_change_is_trained_anew_and_nothing_else(
    recipe: Any, filled: RunFolder, overrides: list[str], anew: list[str]
) -> None:
    assert _anew(recipe(*overrides), filled) == anew


def test_the_error_names_what_differs_what_goes_what_stays_and_what_to_do(recipe: Any, filled: RunFolder) -> None:
    changed = recipe("scheme.assistants.middle.config.d_model=48")
    claim(changed)
    with pytest.raises(ConfigError) as caught:
        settle(changed, _arms(changed), filled, retrain=False)
    assert str(caught.value).split("\n") == [
        f"run_dir: {filled.root} was filled by another recipe:",
        "  scheme.assistants.1.config.d_model: 32 there, 48 here",
        "These arms were planned otherwise, and would be trained anew: middle, student.",
        "These stay as they are: direct, labels_same_steps, large, text.",
        "Type the same command with --retrain to move the former to models/.before and train what is needed; or choose "
        "another folder (run_dir=runs/another).",
    ]


def test_retrain_sets_them_aside_and_takes_the_recipe(recipe: Any, filled: RunFolder) -> None:
    for number, size in enumerate((48, 40), start=1):
        changed = recipe(f"scheme.assistants.middle.config.d_model={size}")
        claim(changed)
        assert settle(changed, _arms(changed), filled, retrain=True) == ["middle", "student"]
        aside = filled.models / ".before" / str(number)
        assert sorted(path.name for path in aside.iterdir()) == ["middle", "student"]
        assert (aside / "middle" / "result.json").exists()
        assert (aside / "middle" / "predictions.jsonl").read_text() == "{}\n"
        assert filled.trained_arms() == ["direct", "labels_same_steps", "large", "text"]
        assert yaml.safe_load(filled.recipe.read_text()) == changed.model_dump(mode="json")
        for arm in _arms(changed):  # as if they were trained
            write_plan(arm, changed, _arms(changed), filled)
            write_json(filled.result(arm.name), {})
            write_text(filled.predictions(arm.name), "{}\n")


def test_a_stage_that_is_no_more_goes_with_the_others(recipe: Any, filled: RunFolder) -> None:
    short = recipe("scheme.assistants=[{name: large, config: {d_model: 64}}]")
    claim(short)
    with pytest.raises(ConfigError, match=r"anew: student\.\nThese are no stages any more: middle\.\n"):
        settle(short, _arms(short), filled, retrain=False)
    assert settle(short, _arms(short), filled, retrain=True) == ["student", "middle"]
    assert filled.trained_arms() == ["direct", "labels_same_steps", "large", "text"]


def test_a_moved_folder_is_the_same_run(recipe: Any, filled: RunFolder, tmp_path: Path) -> None:
    filled.root.rename(tmp_path / "moved")
    assert _anew(recipe(run="moved"), RunFolder(tmp_path / "moved")) == []


def test_a_tokenizer_does_not_know_the_words_of_a_new_target(recipe: Any, filled: RunFolder) -> None:
    new = recipe("objective.rationale.targets=[rationale_then_label]")
    claim(new)
    with pytest.raises(ConfigError, match=r"its tokenizer was trained without the target \['rationale_then_label'\]"):
        settle(new, _arms(new), filled, retrain=True)


@pytest.mark.parametrize(
    "override", ["student.tokenizer.vocab_size=99", "seed=3", "task.train_size=9", "label_from=gold_else_teacher"]
)
def test_rows_and_tokenizer_of_all_are_refused_all_the_same(recipe: Any, filled: RunFolder, override: str) -> None:
    with pytest.raises(ConfigError, match=r"Choose another folder \(run_dir=runs/another\), or delete this one"):
        claim(recipe(override))


def test_a_pretrained_student_that_brings_its_tokenizer_may_not_change(recipe: Any) -> None:
    plain = ("student={model: a/b}", "scheme={kind: step_by_step}")
    run = claim(recipe(*plain))
    run.arm("student").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"student\.model: 'a/b' there, 'a/c' here"):
        claim(recipe("student={model: a/c}", plain[1]))
