"""Stage two: rows from the material, and the training of every arm."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distill_llm.core.errors import ConfigError
from distill_llm.core.example import TARGETS
from distill_llm.core.files import read_json, storage, write_json
from distill_llm.core.processes import main_first
from distill_llm.core.progress import Progress
from distill_llm.data.rows import RowSet, build_rows, target_texts
from distill_llm.data.view import StudentView
from distill_llm.models.load import (
    LoadedModel,
    build_student,
    load_tokenizer,
    parameters_of,
    read_tokenizer,
    student_config,
)
from distill_llm.models.vision import decoder_positions
from distill_llm.pipeline.arms import Arm, Sizes, choose, needed_targets, plan_arms
from distill_llm.pipeline.cuts import settle_cut
from distill_llm.pipeline.plan_facts import write_plan
from distill_llm.pipeline.rationale_stage import Material
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.trial import Trial, student_view
from distill_llm.pipeline.views import check_room, is_asked, make_viewers
from distill_llm.pipeline.workers import run_trials
from distill_llm.recipe.recipe import Recipe
from distill_llm.schemes.stages import STUDENT


@dataclass(frozen=True, slots=True)
class Plan:
    """Every arm of a recipe, and the rows of all of them."""

    arms: list[Arm]
    rows: RowSet


def make_plan(recipe: Recipe, material: Material, run: RunFolder) -> Plan:
    """Builds the tokenizer (saved in the run folder), the rows, and the arms; loads the student once for its size."""
    main_first(lambda: _save_tokenizer(recipe, material, run))
    student = build_student(recipe.student.in_size(), read_tokenizer(str(run.tokenizer), where="student.tokenizer"))
    check_chat(recipe, student.tokenizer)
    view = student_view(recipe, student.tokenizer, student.is_encoder_decoder, student.painter)
    check_positions(recipe, student.model.config, view)
    rows = build_rows(
        material.splits.train,
        material.answers,
        task=recipe.task,
        view=view,
        targets=needed_targets(recipe),
        label_from=recipe.label_from,
        viewers=make_viewers(recipe, student, view),
    )
    check_room(recipe, rows.rows, student)
    return Plan(plan_arms(recipe, rows.rows, sizes_of(recipe, student, run)), rows)


def sizes_of(recipe: Recipe, student: LoadedModel, run: RunFolder) -> Sizes:
    """For the compute of all arms. ``student`` is the recipe's own. Loads no further weights."""
    size = student.num_parameters
    stages: dict[str, int] = {}
    configs: dict[str, Any] = {}
    for stage in recipe.stages:
        source = {str(run.model(name)): name for name in stages}.get(stage.student.model, "")
        cut, where = stage.student.cut, f"scheme: stage '{stage.name}'"
        if stage.name == STUDENT:
            stages[STUDENT] = size
        elif source and cut is None:
            stages[stage.name] = stages[source]
        else:
            begun = configs.get(source)
            stages[stage.name] = parameters_of(stage.student, student.tokenizer, where=where, begun=begun)
        if cut is not None:
            configs[stage.name] = student_config(stage.student, where=where, begun=configs.get(source))
    teachers = {name: spec for name, spec in recipe.teachers.items() if is_asked(recipe, name)}
    for stage in recipe.stages:
        own = {name for name in stage.teachers if name not in recipe.teachers and name not in stages}
        teachers |= {name: stage.teachers[name] for name in own}
    beside = {STUDENT: recipe.stages[-1].scheme.extra_parameters(student, recipe.student)}
    return Sizes(stages, {name: spec.num_parameters(size) for name, spec in teachers.items()}, beside)


def make_trial(recipe: Recipe, material: Material, plan: Plan, run: RunFolder, arm: Arm, rate: float) -> Trial:
    """The arms that ``arm`` needs are trained; a cut that has to be measured is, if no trial was made with it yet."""
    return Trial(
        arm=arm,
        learning_rate=rate,
        recipe=arm.recipe(recipe),
        rows=arm.rows_of(plan.rows.rows),
        validation=material.splits.validation,
        tokenizer=run.tokenizer,
        folder=run.arm(arm.name) / f"rate-{rate:g}",
        cut=settle_cut(arm.student, recipe, plan.rows.rows, run),
    )


def train_arms(
    recipe: Recipe, material: Material, plan: Plan, run: RunFolder, names: Sequence[str], progress: Progress
) -> None:
    """Trains the named arms that are not trained yet. Each has every learning rate of ``tune``; validation picks.

    An arm that needs others waits for them; all that need nothing more are trained side by side. The folder's arms
    are those of the plan (``settle``).
    """
    if all(example.label is None for example in material.splits.validation):
        progress.say("no validation example has a label: nothing is validated, and the last step is kept")
    waiting = [arm for arm in choose(plan.arms, names) if not run.result(arm.name).exists()]
    for arm in waiting:
        write_plan(arm, recipe, plan.arms, run)
    while waiting:
        unfinished = {arm.name for arm in waiting}
        ready = [arm for arm in waiting if unfinished.isdisjoint(arm.after)]
        trials = [
            make_trial(recipe, material, plan, run, arm, rate) for arm in ready for rate in _rates_of(arm, recipe)
        ]
        results = run_trials(trials, recipe.train.workers, progress)
        pairs = list(zip(trials, results, strict=True))
        main_first(partial(_keep_best_of, ready, pairs, run))
        waiting = [arm for arm in waiting if arm not in ready]


def _rates_of(arm: Arm, recipe: Recipe) -> tuple[float, ...]:
    """Where validation cannot choose, the recipe has chosen."""
    chooses = arm.validated and arm.max_steps
    return recipe.train.tune if recipe.train.tune and chooses else (recipe.train.learning_rate,)


def _keep_best_of(arms: Sequence[Arm], pairs: Sequence[tuple[Trial, dict[str, Any]]], run: RunFolder) -> None:
    for arm in arms:
        _keep_best(arm, [pair for pair in pairs if pair[0].arm is arm], run)


def _keep_best(arm: Arm, trials: Sequence[tuple[Trial, dict[str, Any]]], run: RunFolder) -> None:
    """Moves the model with the best validation accuracy up to the arm's folder; those that learned beside the student
    to folders of their own."""
    best, result = max(trials, key=lambda pair: pair[1]["validation_accuracy"] or 0.0)
    facts = read_json(run.plan(arm.name)) | {"scored": arm.scored}
    learner, others = result.get("learner", STUDENT), result.get("others", {})
    if learner != STUDENT and others:
        facts["description"] += f" ({learner}, the best of {len(others) + 1} on validation)"
    for name, accuracy in others.items() if arm.name == STUDENT else ():
        described = f"{arm.scheme.describe(name)}, from its training: {arm.description}"
        own = {"description": described, "validation_accuracy": accuracy, "learner": name, "others": {}}
        _move(best.folder / "others" / name, run.model(name))
        write_json(run.result(name), facts | result | own)
    _move(best.folder / "model", run.model(arm.name))
    write_json(run.result(arm.name), facts | result | {"trials": [result for _, result in trials]})
    for trial, _ in trials:
        shutil.rmtree(trial.folder, ignore_errors=True)


def _move(model: Path, to: Path) -> None:
    """Nothing where a run that was interrupted has moved it already."""
    with storage(to):
        if model.exists():
            shutil.rmtree(to, ignore_errors=True)
            to.parent.mkdir(parents=True, exist_ok=True)
            model.rename(to)


def check_chat(recipe: Recipe, tokenizer: Any) -> None:
    """Raises ConfigError where the recipe wants a chat template that the tokenizer has not."""
    if recipe.student.chat and not tokenizer.chat_template:
        raise ConfigError("student.chat: the tokenizer has no chat template. Set student.chat=false.")


def check_positions(recipe: Recipe, config: Any, view: StudentView) -> None:
    """Raises ConfigError where the decoder of a student that reads pictures has fewer positions than a target takes."""
    positions = decoder_positions(config) if recipe.student.picture is not None else None
    prefix = max(len(view.decoder_prefix(target)) for target in needed_targets(recipe))
    longest = recipe.train.max_target_tokens + prefix
    if positions is not None and longest > positions:
        raise ConfigError(
            f"train.max_target_tokens: {longest} tokens with the prefix, but the student's decoder has {positions} "
            f"positions. Set it to {positions - prefix} at most, or give a fresh decoder more of them."
        )


def _save_tokenizer(recipe: Recipe, material: Material, run: RunFolder) -> None:
    """Makes it anew until a training has begun: what was learned from (`keep`) or its settings may have changed."""
    if run.tokenizer.exists() and run.training_has_begun:
        return
    tokenizer = load_tokenizer(recipe.student, training_text(recipe, material))
    draft = Path(f"{run.tokenizer}.part")
    shutil.rmtree(draft, ignore_errors=True)
    with storage(run.tokenizer):
        tokenizer.save_pretrained(str(draft))
        shutil.rmtree(run.tokenizer, ignore_errors=True)
        draft.rename(run.tokenizer)


def training_text(recipe: Recipe, material: Material) -> Iterator[str]:
    """Everything that the student reads or writes while it is trained, and nothing of validation or test."""
    prefixes, targets = recipe.student.prefixes, needed_targets(recipe)
    for target in TARGETS:
        yield prefixes.of(target)
    for example in material.splits.train:
        answer = material.answers.get(example.id)
        yield example.input
        for target in targets:
            yield from target_texts(example, answer, target, task=recipe.task, label_from=recipe.label_from)
