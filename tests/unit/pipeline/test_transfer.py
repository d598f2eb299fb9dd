"""A transfer set without some classes: what the student sees, what chooses, and how the classes come out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill_llm.core.errors import ConfigError, DataError
from distill_llm.core.example import Example, Splits, TeacherAnswer
from distill_llm.pipeline import student_stage
from distill_llm.pipeline.rationale_stage import Material, check
from distill_llm.pipeline.run import evaluate
from distill_llm.pipeline.run import run as run_all
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.transfer import transferred
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe

YAML = """
name: bill
task: {kind: bill, products: 20, highest_price: 10, train_size: 96, validation_size: 40, test_size: 50}
transfer: {without: [fair]}
student:
  config: {model_type: t5, d_model: 16, d_kv: 8, d_ff: 16, num_layers: 1, num_heads: 2, dropout_rate: 0.0}
  tokenizer: TOKENIZER
objective: [{name: label, loss: {kind: cross_entropy}, targets: [label]}]
train: {max_steps: 4, rows_per_step: 16, rows_per_batch: 16, learning_rate: 2.0e-2, optimizer: adafactor}
evaluate: {by: likelihood, controls: [labels_same_steps], resamples: 100}
"""
WORDS = "and : how dear ? cheap low fair high dear"


@pytest.fixture
def bill(tmp_path: Path, tiny_t5: Any) -> Callable[..., Recipe]:
    tiny_t5(text=WORDS).tokenizer.save_pretrained(tmp_path / "words")

    def build(*overrides: str) -> Recipe:
        text = YAML.replace("TOKENIZER", str(tmp_path / "words"))
        return recipe_from(parse_yaml(text, "bill"), [f"run_dir={tmp_path}/run", *overrides])

    return build


def _material(votes: dict[str, str] | None = None) -> Material:
    def examples(split: str) -> tuple[Example, ...]:
        labels = ("cheap", "fair", "dear", None)
        return tuple(Example(f"{split}-{label}", f"{split} {label}", "", label=label) for label in labels)

    answers = {f"train-{id}": TeacherAnswer(vote, (), 1.0) for id, vote in (votes or {}).items()}
    return Material(Splits(examples("train"), examples("validation"), examples("test")), answers, {})


def _left(recipe: Recipe, material: Material) -> list[list[str | None]]:
    splits = transferred(recipe, material).splits
    return [[example.id.partition("-")[2] for example in split] for split in (splits.train, splits.validation)]


def test_examples_go_by_the_label_that_would_be_learned(bill: Any) -> None:
    """One without a label goes too: it may be of any class. Test stays whole."""
    assert _left(bill(), _material()) == [["cheap", "dear"], ["cheap", "dear"]]
    assert _left(bill("transfer={only: [fair]}"), _material()) == [["fair"], ["fair"]]
    assert len(transferred(bill(), _material()).splits.test) == 4
    whole = _material()
    assert transferred(bill("transfer=null"), whole) is whole


@pytest.mark.parametrize(
    ("label_from", "left"), [("teacher", ["fair", "None"]), ("gold_else_teacher", ["cheap", "dear", "None"])]
)
def test_votes_decide_where_votes_are_learned(bill: Any, label_from: str, left: list[str]) -> None:
    votes = {"cheap": "fair", "fair": "cheap", "dear": "fair", "None": "low"}
    recipe = bill("rationales={teacher: {kind: gold}}", f"label_from={label_from}", "task.labelled=false")
    assert _left(recipe, _material(votes))[0] == left


def test_labels_that_do_not_exist_and_sets_that_are_empty_are_refused(bill: Any) -> None:
    with pytest.raises(ConfigError, match=r"transfer: no example has the label 'fare'.*'cheap'"):
        check(bill("transfer={without: [fare]}"))
    with pytest.raises(DataError, match=r"transfer: no train example is left"):
        transferred(bill("transfer={without: [cheap, low, fair, high, dear]}"), _material_of_bill(bill()))
    for wrong in ("{}", "{without: [fair], only: [low]}"):
        with pytest.raises(ConfigError, match=r"transfer: give the labels that are left out as `without`"):
            bill(f"transfer={wrong}")


def _material_of_bill(recipe: Recipe) -> Material:
    return Material(recipe.task.load(0), {}, {})


def test_what_cannot_be_scored_by_likelihood_is_refused(bill: Any, even: Any) -> None:
    with pytest.raises(ConfigError, match="by: likelihood scores labels, but target is rationale"):
        bill("evaluate.target=rationale")
    with pytest.raises(ConfigError, match="label_bias is added to likelihoods"):
        bill("evaluate={label_bias: {fair: fit}}")
    with pytest.raises(ConfigError, match=r"evaluate\.label_bias\.fare: no example of the validation split"):
        check(bill("evaluate.label_bias={fare: 1.0}"))
    with pytest.raises(DataError, match=r"evaluate\.by: likelihood chooses among an example's labels"):
        check(even("evaluate.by=likelihood"))
    with pytest.raises(ConfigError, match=r"evaluate\.label_bias\.fair: it is fitted on validation, where no example"):
        check(bill("evaluate.label_bias={fair: fit}", "task.limits.validation=1"))


def test_a_run_tells_how_each_class_was_recognised(bill: Any, sayings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student never sees the class; an offset by which it always wins answers it and nothing else."""
    plans = []
    original = student_stage.make_plan
    monkeypatch.setattr(student_stage, "make_plan", lambda *of: plans.append(original(*of)) or plans[-1])
    card = run_all(bill("evaluate.label_bias={fair: 1000.0}"), progress=sayings)
    examples = [example for example in bill().task.load(17).train if example.label != "fair"]
    assert len({row.example for row in plans[0].rows.rows}) == len(examples)
    assert f"transfer: the student sees {len(examples)} of 96 training examples" in sayings.said
    classes = {one.label: one for one in card.classes}
    assert [label for label, one in classes.items() if one.left_out] == ["fair"]
    assert sum(one.num_examples for one in classes.values()) == 50
    assert {label: one.recall["student"] for label, one in classes.items()} == {
        label: float(label == "fair") for label in classes
    }
    names = [entry.name for entry in card.entries]
    assert names == ["student", "student without bias", "labels same steps"]
    assert card.entries[0].accuracy == pytest.approx(classes["fair"].num_examples / 50)
    assert any("label_bias in nats: fair +1000.00 (given by the recipe)" in note for note in card.notes)
    assert any(note.startswith("Transfer set without the labels fair: ") for note in card.notes)
    assert "| fair (left out) |" in (RunFolder(bill().folder).root / "scorecard.md").read_text()
    again = evaluate(bill().folder, overrides=["evaluate.label_bias={fair: fit}"])
    (note,) = [note for note in again.notes if note.startswith("student: label_bias")]
    assert "(fitted on 40 validation examples, of which " in note
