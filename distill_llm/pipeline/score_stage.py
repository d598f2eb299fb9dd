"""Stage three: every trained model answers the test split, once, and the scorecard says what came out."""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Mapping
from typing import Any

from distill_llm.core.errors import ConfigError, DataError
from distill_llm.core.example import Splits
from distill_llm.core.files import read_json
from distill_llm.core.progress import Progress
from distill_llm.data.view import StudentView
from distill_llm.evaluation.likelihood import fit_bias
from distill_llm.evaluation.metric import load_metric, metric_name
from distill_llm.evaluation.predict import Predictions
from distill_llm.evaluation.scorecard import Facts, Scorecard, build_scorecard, installed_versions, save_scorecard
from distill_llm.models.folder import weight_bytes
from distill_llm.models.generate import default_device
from distill_llm.models.load import load_model, read_tokenizer
from distill_llm.models.picture import Painter
from distill_llm.models.vision import read_painter
from distill_llm.pipeline.avalanche_stage import avalanche_of, save_predictions
from distill_llm.pipeline.rationale_stage import Material
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.standing import warnings_of
from distill_llm.pipeline.transfer import left_out
from distill_llm.pipeline.trial import answers, student_view
from distill_llm.rationales.dataset import read_rows
from distill_llm.rationales.members import describe_dropped, own_votes
from distill_llm.recipe.recipe import Recipe
from distill_llm.schemes.stages import STUDENT
from distill_llm.teachers.base import TeacherFacts

TEACHER = "teacher"
_MOST_CLASSES = 20


def check_test_labels(splits: Splits) -> None:
    """Raises DataError where the test split has an example without a label."""
    if any(example.label is None for example in splits.test):
        raise DataError("the test split has examples without a label: nothing can be scored on them. Add the labels.")


def score(recipe: Recipe, material: Material, run: RunFolder, progress: Progress) -> Scorecard:
    """Scores what is trained. Raises ConfigError without a trained student, DataError without test labels."""
    arms = [arm for arm in run.trained_arms() if read_json(run.result(arm)).get("scored", True)]
    if STUDENT not in arms:
        raise ConfigError(f"{run.root}: no student is trained here yet. Type: distill-llm train {run.recipe}")
    check_test_labels(material.splits)
    results: dict[str, tuple[Facts, list[bool]]] = {}
    if material.test_answers:
        results |= _score_teachers(recipe, material, run)
    biases: list[str] = []
    for arm in sorted(arms, key=lambda name: (name != STUDENT, name)):
        results |= _score_arm(recipe, material, run, arm, progress, biases)
    answers = {arm: results[arm.replace("_", " ")][1] for arm in arms}
    labels = _labels_of_classes(material)
    scorecard = build_scorecard(
        results,
        student=STUDENT,
        task=type(recipe.task).model_fields["kind"].default,
        metric=metric_name(recipe.task.answer_kind()),
        hardware=hardware(),
        created=datetime.datetime.now(datetime.UTC).date(),
        versions=installed_versions(),
        seed=recipe.seed,
        resamples=recipe.evaluate.resamples,
        notes=[*_notes(recipe, material, run), *biases],
        labels=labels,
        left_out=left_out(recipe, labels),
        avalanche=avalanche_of(recipe, material.splits.test, run, answers, progress),
    )
    save_scorecard(run.root, scorecard)
    return scorecard


def _score_teachers(recipe: Recipe, material: Material, run: RunFolder) -> dict[str, tuple[Facts, list[bool]]]:
    """The voted label on each test example; one that states none is wrong. Of several teachers each by itself too."""
    assert recipe.rationales is not None
    spec = recipe.rationales
    voices = [voice for voice in spec.voices if voice.votes]
    voted = {id: answer.label for id, answer in material.test_answers.items()}
    samples = sum(voice.samples for voice in voices)
    speed = run.completions_per_second("test") if any(voice.teacher.computes for voice in voices) else None
    facts = _teacher_facts(spec.teacher.describe(), samples, speed)
    results = {TEACHER: (facts, _right(recipe, material, voted))}
    for voice in voices if spec.teacher.members() else ():
        votes = own_votes(read_rows(run.rationales("test")), voice.name, recipe.task)
        if len(votes) == len(material.splits.test):
            alone = _teacher_facts(voice.describe(), voice.samples, None)
            results[f"teacher {voice.name}"] = (alone, _right(recipe, material, votes))
    return results


def _right(recipe: Recipe, material: Material, said: Mapping[str, str | None]) -> list[bool]:
    labels = [(said[example.id], example.label or "") for example in material.splits.test]
    return [label is not None and recipe.task.same(label, gold) for label, gold in labels]


def _teacher_facts(known: TeacherFacts, samples: int, speed: float | None) -> Facts:
    return Facts(
        role="teacher",
        description=f"{known.name}, completions an example: {samples}",
        parameters=known.parameters,
        bytes=known.num_bytes,
        examples_per_second=speed / samples if speed else None,
    )


def _labels_of_classes(material: Material) -> list[str]:
    """The gold labels of the test split, where they are classes: few, and each of several examples."""
    labels = [example.label or "" for example in material.splits.test]
    closed = all(example.choices for example in material.splits.test)
    return labels if closed and len(set(labels)) <= _MOST_CLASSES else []


def _score_arm(
    recipe: Recipe, material: Material, run: RunFolder, arm: str, progress: Progress, biases: list[str]
) -> dict[str, tuple[Facts, list[bool]]]:
    """What an arm scores, by name; the main student without its bias too. Adds a note to ``biases`` for each bias."""
    trained = read_json(run.result(arm))
    folder = str(run.model(arm))
    model = load_model(folder, where=f"arm {arm}").to(default_device())
    tokenizer = read_tokenizer(folder, where=f"arm {arm}")
    painter = _painter(recipe, folder, model.config, arm)
    name, view = arm.replace("_", " "), student_view(recipe, tokenizer, model.config.is_encoder_decoder, painter)
    test = material.splits.test
    predictions, scores = answers(recipe, model, view, test, trained["target"], progress=progress, name=f"test, {name}")
    plain = predictions
    if scores is not None and recipe.evaluate.label_bias:
        bias, note = _bias(recipe, material, model, view, progress, name)
        biases.append(note)
        predictions = scores.predictions(recipe.task, bias)
    right = [bool(one.correct) for one in predictions.items]
    _agree_with_metric(recipe, material, predictions, right)
    save_predictions(run, arm, predictions)
    own = trained if trained["steps"] else {}  # of a stage that was not trained there is nothing to say
    facts = Facts(
        role=trained["role"],
        description=trained["description"],
        parameters=sum(weight.numel() for weight in model.parameters()),
        bytes=weight_bytes(folder),
        train_seconds=own.get("seconds"),
        train_steps=own.get("steps"),
        train_tokens=own.get("tokens"),
        learning_rate=own.get("learning_rate"),
        validation_accuracy=trained["validation_accuracy"],
        examples_per_second=len(predictions.items) / predictions.seconds if predictions.seconds > 0 else None,
    )
    found = {name: (facts, right)}
    if plain is not predictions and arm == STUDENT:
        without = facts.model_copy(update={"description": "the same student, without label_bias"})
        found["student without bias"] = (without, [bool(one.correct) for one in plain.items])
    return found


def _bias(
    recipe: Recipe, material: Material, model: Any, view: StudentView, progress: Progress, name: str
) -> tuple[dict[str, float], str]:
    """The offsets that the recipe gives, or that validation chooses, and a sentence about them."""
    wanted = recipe.evaluate.label_bias
    bias = {label: offset for label, offset in wanted.items() if offset != "fit"}
    fitted = [label for label, offset in wanted.items() if offset == "fit"]
    how = "given by the recipe"
    if fitted:
        known = [example for example in material.splits.validation if example.label is not None]
        _, scores = answers(recipe, model, view, known, "label", progress=progress, name=f"bias, {name}")
        assert scores is not None, "the recipe asks for likelihoods"
        bias |= fit_bias(scores.scores, [example.label or "" for example in known], fitted, bias)
        before, after = (
            sum(bool(one.correct) for one in scores.predictions(recipe.task, offsets).items) for offsets in ({}, bias)
        )
        how = f"fitted on {len(known):,} validation examples, of which {after:,} are right with it, {before:,} without"
    offsets = ", ".join(f"{label} {offset:+.2f}" for label, offset in bias.items())
    return bias, f"{name}: label_bias in nats: {offsets} ({how})."


def _painter(recipe: Recipe, folder: str, config: Any, arm: str) -> Painter | None:
    picture = recipe.student.picture
    return read_painter(picture, folder, "main", config, where=f"arm {arm}") if picture is not None else None


def _agree_with_metric(recipe: Recipe, material: Material, predictions: Predictions, right: list[bool]) -> None:
    """The reported accuracy is the metric module's own."""
    computed: Any = load_metric(recipe.task.answer_kind()).compute(
        predictions=[one.label for one in predictions.items],
        references=[example.label for example in material.splits.test],
    )
    assert math.isclose(computed["accuracy"], sum(right) / len(right)), (computed, sum(right) / len(right))


def _notes(recipe: Recipe, material: Material, run: RunFolder) -> list[str]:
    tuned = recipe.train.tune
    notes = [
        f"Every student and control was trained with each of the learning rates {list(tuned)}; validation chose."
        if tuned
        else f"Every student and control was trained with the learning rate {recipe.train.learning_rate:g}, untuned."
    ]
    missing = [name for name in recipe.evaluate.controls if name not in run.trained_arms()]
    if missing:
        notes.append(f"Controls that are not trained yet: {', '.join(missing)}; `distill-llm run` trains them.")
    funnel = read_json(run.funnel) if recipe.rationales is not None and run.funnel.exists() else {}
    notes += describe_dropped({split: counts.get("teachers", {}) for split, counts in funnel.items()})
    notes += _validated_by_votes(material, run)
    notes += warnings_of(read_json(run.lacking)) if run.lacking.exists() else []
    if recipe.transfer is not None:
        which, these = ("with only", "any other label") if recipe.transfer.only else ("without", "them")
        notes.append(
            f"Transfer set {which} the labels {', '.join(recipe.transfer.named)}: students and controls saw no example "
            f"of {these} in training, and validation chose by none."
        )
    if recipe.train.workers > 1:
        notes.append(f"Up to {recipe.train.workers} trainings ran side by side, each on one thread.")
    return notes


def _validated_by_votes(material: Material, run: RunFolder) -> list[str]:
    """A sentence where validation examples have no gold label, and the teacher's stands in for it."""
    path = run.rationales("validation")
    unlabelled = {row.example_id for row in read_rows(path) if row.gold_label is None} if path.exists() else set()
    labelled = [example.id for example in material.splits.validation if example.label is not None]
    voted = len(unlabelled.intersection(labelled))
    if not voted:
        return []
    return [
        f"Validation was by the teacher's votes on {voted:,} of {len(labelled):,} examples, which have no gold label: "
        "what it chose, checkpoints and perhaps learning rates, agrees with the teacher there, right or wrong."
    ]


def hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    return processor()


def processor() -> str:
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"
