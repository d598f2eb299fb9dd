"""Students that are cut out of larger models, in a run: one cut for all arms, measured once, of the said sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill_llm.core.errors import ConfigError
from distill_llm.core.files import read_json, write_json
from distill_llm.core.progress import SILENT
from distill_llm.models.load import count_parameters, load_model, read_config, read_tokenizer
from distill_llm.pipeline.cuts import calibration_rows
from distill_llm.pipeline.doctor import examine
from distill_llm.pipeline.needs import needs_of_stages
from distill_llm.pipeline.plan_facts import settle
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.student_stage import train_arms
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe
from tests.conftest import SHOP_WORDS

YAML = """
name: tiny
task: {kind: shop, products: 20, train_size: 24, validation_size: 4, test_size: 4}
rationales: {teacher: {kind: gold}}
student: {model: FOLDER, cut: {ratio: 0.5}}
teachers: {uncut: {kind: frozen, model: FOLDER}}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: soft, loss: {kind: forward_kl}, targets: [label, rationale], teacher: uncut}
train: {learning_rate: 1.0e-2, max_steps: 4, rows_per_step: 8, rows_per_batch: 8}
evaluate: {controls: [labels_same_steps], from_scratch: true, ablations: {soft_alone: [soft]}, max_new_tokens: 2}
"""
STILL = "train.learning_rate=1e-30"
ALONE = ("evaluate.from_scratch=false", "evaluate.controls=[]", "evaluate.ablations={}")
PRUNE = ("scheme={kind: prune, cuts: 3}", "train.max_steps=8")
SIZES = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2},
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
}


@pytest.fixture
def family() -> str:
    """Of the teacher; a test may say otherwise."""
    return "t5"


of_both = pytest.mark.parametrize("family", ["t5", "llama"])


@pytest.fixture
def recipe(request: pytest.FixtureRequest, family: str, tmp_path: Path) -> Any:
    """The recipe with overrides; its teacher is tiny."""
    big = request.getfixturevalue(f"tiny_{family}")(seed=7, text=SHOP_WORDS, **SIZES[family])
    for part in (big.model, big.tokenizer):
        part.save_pretrained(tmp_path / "big")
    text = YAML.replace("FOLDER", str(tmp_path / "big"))

    def build(*overrides: str) -> Recipe:
        return recipe_from(parse_yaml(text, "tiny"), [f"run_dir={tmp_path / 'run'}", *overrides]).resolved()

    return build


@pytest.fixture
def trained(planned: Any) -> Any:
    """Trains arms of a recipe; gives its run folder."""

    def train(recipe: Recipe, *arms: str, retrain: bool = False) -> RunFolder:
        run, material, plan = planned(recipe)
        settle(recipe, plan.arms, run, retrain=retrain)
        train_arms(recipe, material, plan, run, arms or ["all"], SILENT)
        return run

    return train


def _weights(run: RunFolder, arm: str) -> dict[str, torch.Tensor]:
    return load_file(run.model(arm) / "model.safetensors")


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@of_both
def test_student_ablations_and_controls_start_from_one_cut_and_from_scratch_has_its_sizes(
    recipe: Any, trained: Any
) -> None:
    """Without a step that moves them, they are what they start from; the control has rows of labels alone."""
    run = trained(recipe(STILL))
    student = _weights(run, "student")
    assert _same(student, _weights(run, "labels_same_steps"))
    assert _same(student, _weights(run, "soft_alone"))
    assert len(list((run.root / "cuts").glob("*.json"))) == 1, "measured once"
    fresh = _weights(run, "from_scratch")
    assert {name: one.shape for name, one in fresh.items()} == {name: one.shape for name, one in student.items()}
    assert not any(torch.equal(fresh[name], one) for name, one in student.items() if one.dim() > 1)
    parameters = count_parameters(str(run.model("student")), where="x")
    assert parameters <= 0.5 * count_parameters(recipe().student.model, where="x")
    assert parameters == sum(weight.numel() for weight in load_model(str(run.model("student")), where="x").parameters())


def test_other_controls_or_seeds_of_training_do_not_change_the_cut(recipe: Any, trained: Any) -> None:
    first = set(_cuts(trained(recipe(STILL), "student")))
    assert set(_cuts(trained(recipe(STILL, *ALONE, "train.seed=99"), "student", retrain=True))) == first
    other = set(_cuts(trained(recipe(STILL, "student.cut.calibration_rows=5"), "student", retrain=True)))
    assert len(other) == 2


def _cuts(run: RunFolder) -> list[str]:
    return [path.name for path in (run.root / "cuts").glob("*.json")]


def test_a_cut_that_was_measured_is_read_and_not_measured_again(recipe: Any, trained: Any) -> None:
    run = trained(recipe(STILL), "labels_same_steps")
    (file,) = (run.root / "cuts").glob("*.json")
    said = read_json(file)
    there = read_config(recipe().student.model, where="x")
    kept = said["kept"]["units"]["hidden"]
    said["kept"]["units"]["hidden"] = sorted(set(range(there.hidden_size)) - set(kept))[: len(kept)]
    assert len(said["kept"]["units"]["hidden"]) < len(kept), "fewer than half were left out"
    write_json(file, said)
    trained(recipe(STILL), "soft_alone")
    config = read_config(str(run.model("soft_alone")), where="x")
    assert config.hidden_size == len(said["kept"]["units"]["hidden"])


def test_pruning_measures_what_the_stage_before_left_and_comes_to_the_size_of_one_cut(
    recipe: Any, trained: Any
) -> None:
    pruned = recipe(*PRUNE, *ALONE, "evaluate.ablations={one_cut: [label, soft]}")
    run = trained(pruned)
    assert len(_cuts(run)) == 4, "one for each of three stages, and the single cut of the ablation"
    sizes = [count_parameters(str(run.model(name)), where="x") for name in ("cut_1", "cut_2", "student", "one_cut")]
    whole = count_parameters(pruned.student.model, where="x")
    assert whole > sizes[0] > sizes[1] > sizes[2] == sizes[3] > 0.35 * whole
    steps = {name: read_json(run.result(name))["steps"] for name in ("cut_1", "cut_2", "student", "one_cut")}
    assert steps == {"cut_1": 2, "cut_2": 2, "student": 4, "one_cut": 8}
    abouts = [read_json(path) for path in (run.root / "cuts").glob("*.json")]
    models = sorted(about["model"] for about in abouts)
    assert models == sorted(
        [str(run.model("cut_1")), str(run.model("cut_2")), pruned.student.model, pruned.student.model]
    )
    tokenizer = read_tokenizer(str(run.tokenizer), where="x")
    assert [one.parameters for one in needs_of_stages(pruned, tokenizer)] == sizes[:3], "said before it begins"


@of_both
def test_the_sizes_of_stages_are_those_that_compute_is_paid_for_by(recipe: Any, planned: Any) -> None:
    _, _, plan = planned(recipe(*PRUNE, "evaluate.controls=[labels_same_compute]", "evaluate.ablations={}"))
    control = next(arm for arm in plan.arms if arm.name == "labels_same_compute")
    assert control.max_steps > 8, "stages that are larger than the student cost more than its steps"


def test_a_changed_cut_is_trained_anew(recipe: Any, trained: Any, planned: Any) -> None:
    run = trained(recipe(STILL, "evaluate.from_scratch=false"), "student")
    changed = recipe(STILL, "student.cut.by=spread")
    _, _, plan = planned(changed)
    with pytest.raises(ConfigError, match=r"(?s)student.cut.by: 'importance' there, 'spread' here.*anew: student"):
        settle(changed, plan.arms, run, retrain=False)


def test_calibration_rows_are_drawn_from_the_rows_of_the_objective(recipe: Any, planned: Any) -> None:
    of_labels = "objective=[{name: label, loss: {kind: cross_entropy}, targets: [rationale_then_label]}]"
    asked = recipe(of_labels, "evaluate.ablations={}")
    _, _, plan = planned(asked)
    assert {row.target for row in plan.rows.rows} == {"label", "rationale_then_label"}, "the control needs labels"
    sample = calibration_rows(asked, plan.rows.rows, 10)
    assert (len(sample), {row.target for row in sample}) == (10, {"rationale_then_label"})
    assert sample == calibration_rows(asked, plan.rows.rows, 10)


def test_doctor_says_what_is_cut_and_looks_at_the_measured_one(recipe: Any) -> None:
    diagnosis = examine(recipe("rationales={teacher: {kind: gold}}"))
    said = {finding.what: finding.said for finding in diagnosis.findings}
    assert "parameters" in said["cut"]
    assert "layers" in said["cut"]
    assert diagnosis.terms, "it went on to the first step"


def test_a_student_may_have_the_sizes_of_a_model_and_weights_of_its_own(recipe: Any, trained: Any) -> None:
    run = trained(recipe(f"student={{model: {recipe().student.model}, fresh: true}}", *ALONE, STILL))
    fresh = _weights(run, "student")
    whole = load_model(recipe().student.model, where="x").state_dict()
    assert {name: one.shape for name, one in fresh.items()} == {name: whole[name].shape for name in fresh}
    assert not any(torch.equal(one, whole[name]) for name, one in fresh.items() if one.dim() > 1)


@of_both
def test_spread_needs_no_rows(recipe: Any, trained: Any) -> None:
    """DistilBERT's way: every other layer of the teacher, without a measurement."""
    run = trained(recipe("student.cut={layers: 1, by: last}", *ALONE, STILL))
    assert not (run.root / "cuts").exists()
    mine, whole = _weights(run, "student"), load_model(recipe().student.model, where="x").state_dict()
    name, source = ("model.layers.0", "model.layers.1")
    if "shared.weight" in whole:
        name, source = ("decoder.block.0", "decoder.block.1")
    own = [one for one in mine if one.startswith(f"{name}.") and "relative_attention_bias" not in one]
    assert own
    assert all(torch.equal(mine[one], whole[one.replace(name, source)]) for one in own)


def test_exits_are_those_of_the_cut_student(recipe: Any, trained: Any) -> None:
    """Counted by the depth that is left, in checks and in what is trained."""
    from distill_llm.schemes.self_distill import SelfDistill

    exits = ("scheme={kind: self_distill, exits: [1]}", "student.cut={neurons: 16, layers: LAYERS}")
    shallow = recipe(*(word.replace("LAYERS", "1") for word in exits), *ALONE)
    with pytest.raises(ConfigError, match="1 is not before the last of the 1 layers"):
        SelfDistill().check(shallow)
    run = trained(recipe(*(word.replace("LAYERS", "2") for word in exits), *ALONE, STILL))
    config = read_config(str(run.model("exit_1")), where="x")
    assert (config.num_decoder_layers, config.d_ff) == (1, 16)
