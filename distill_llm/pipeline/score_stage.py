"""Stage three: every trained model answers the test split, once, and the scorecard says what came out."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
from dataclasses import asdict
from typing import Any

from distill_llm.core.errors import ConfigError, DataError
from distill_llm.core.example import Splits
from distill_llm.core.files import read_json, write_text
from distill_llm.core.progress import Progress
from distill_llm.evaluation.metric import load_metric, metric_name
from distill_llm.evaluation.predict import Predictions, predict
from distill_llm.evaluation.scorecard import Facts, Scorecard, build_scorecard, installed_versions, save_scorecard
from distill_llm.models.generate import default_device
from distill_llm.models.load import load_model, read_tokenizer, weight_bytes
from distill_llm.models.picture import Painter
from distill_llm.models.vision import read_painter
from distill_llm.pipeline.arms import STUDENT
from distill_llm.pipeline.rationale_stage import Material
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.trial import max_new_tokens, student_view
from distill_llm.recipe.recipe import Recipe

TEACHER = "teacher"


def check_test_labels(splits: Splits) -> None:
    """Raises DataError where the test split has an example without a label."""
    if any(example.label is None for example in splits.test):
        raise DataError("the test split has examples without a label: nothing can be scored on them. Add the labels.")


def score(recipe: Recipe, material: Material, run: RunFolder, progress: Progress) -> Scorecard:
    """Scores what is trained. Raises ConfigError without a trained student, DataError without test labels."""
    arms = run.trained_arms()
    if STUDENT not in arms:
        raise ConfigError(f"{run.root}: no student is trained here yet. Type: distill-llm train {run.recipe}")
    check_test_labels(material.splits)
    results: dict[str, tuple[Facts, list[bool]]] = {}
    if material.test_answers:
        results[TEACHER] = _score_teacher(recipe, material, run)
    for arm in sorted(arms, key=lambda name: (name != STUDENT, name)):
        results[arm.replace("_", " ")] = _score_arm(recipe, material, run, arm, progress)
    scorecard = build_scorecard(
        results,
        student=STUDENT,
        task=type(recipe.task).model_fields["kind"].default,
        metric=metric_name(recipe.task.answer_kind()),
        hardware=_hardware(),
        created=datetime.datetime.now(datetime.UTC).date(),
        versions=installed_versions(),
        seed=recipe.seed,
        resamples=recipe.evaluate.resamples,
        notes=_notes(recipe, run),
    )
    save_scorecard(run.root, scorecard)
    return scorecard


def _score_teacher(recipe: Recipe, material: Material, run: RunFolder) -> tuple[Facts, list[bool]]:
    """The teacher's voted label on each test example; one that states none is wrong."""
    assert recipe.rationales is not None
    teacher = recipe.rationales.teacher
    known = teacher.describe()
    right = []
    for example in material.splits.test:
        said = material.test_answers[example.id].label
        right.append(said is not None and recipe.task.same(said, example.label or ""))
    speed = run.completions_per_second("test") if teacher.computes else None
    facts = Facts(
        role="teacher",
        description=f"{known.name}, completions an example: {recipe.rationales.samples}",
        parameters=known.parameters,
        bytes=known.num_bytes,
        examples_per_second=speed / recipe.rationales.samples if speed else None,
    )
    return facts, right


def _score_arm(
    recipe: Recipe, material: Material, run: RunFolder, arm: str, progress: Progress
) -> tuple[Facts, list[bool]]:
    trained = read_json(run.result(arm))
    folder = str(run.model(arm))
    model = load_model(folder, where=f"arm {arm}").to(default_device())
    tokenizer = read_tokenizer(folder, where=f"arm {arm}")
    predictions = predict(
        model,
        student_view(recipe, tokenizer, model.config.is_encoder_decoder, _painter(recipe, folder, model.config, arm)),
        material.splits.test,
        task=recipe.task,
        target=trained["target"],
        batch_rows=recipe.evaluate.batch_rows,
        max_new_tokens=max_new_tokens(recipe),
        progress=progress,
        name=f"test, {arm.replace('_', ' ')}",
    )
    right = [bool(one.correct) for one in predictions.items]
    _agree_with_metric(recipe, material, predictions, right)
    lines = [json.dumps(asdict(one), ensure_ascii=False) for one in predictions.items]
    write_text(run.predictions(arm), "\n".join(lines) + "\n")
    facts = Facts(
        role=trained["role"],
        description=trained["description"],
        parameters=sum(weight.numel() for weight in model.parameters()),
        bytes=weight_bytes(folder),
        train_seconds=trained["seconds"],
        train_steps=trained["steps"],
        train_tokens=trained["tokens"],
        learning_rate=trained["learning_rate"],
        validation_accuracy=trained["validation_accuracy"],
        examples_per_second=len(predictions.items) / predictions.seconds if predictions.seconds > 0 else None,
    )
    return facts, right


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


def _notes(recipe: Recipe, run: RunFolder) -> list[str]:
    tuned = recipe.train.tune
    notes = [
        f"Every student and control was trained with each of the learning rates {list(tuned)}; validation chose."
        if tuned
        else f"Every student and control was trained with the learning rate {recipe.train.learning_rate:g}, untuned."
    ]
    missing = [name for name in recipe.evaluate.controls if name not in run.trained_arms()]
    if missing:
        notes.append(f"Controls that are not trained yet: {', '.join(missing)}; `distill-llm run` trains them.")
    if recipe.train.workers > 1:
        notes.append(f"Up to {recipe.train.workers} trainings ran side by side, each on one thread.")
    return notes


def _hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"
