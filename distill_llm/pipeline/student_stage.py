"""Stage two: rows from the material, and the training of every arm."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_llm.core.errors import ConfigError
from distill_llm.core.files import fingerprint, read_json, storage, write_json
from distill_llm.core.progress import Progress
from distill_llm.data.rows import RowSet, build_rows, target_texts
from distill_llm.data.view import StudentView
from distill_llm.models.load import build_student, load_tokenizer, read_tokenizer
from distill_llm.models.vision import decoder_positions
from distill_llm.pipeline.arms import Arm, choose, needed_targets, plan_arms
from distill_llm.pipeline.rationale_stage import Material
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.trial import Trial, student_view
from distill_llm.pipeline.views import is_asked, make_viewers
from distill_llm.pipeline.workers import run_trials
from distill_llm.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Plan:
    """Every arm of a recipe, and the rows of all of them."""

    arms: list[Arm]
    rows: RowSet


def make_plan(recipe: Recipe, material: Material, run: RunFolder) -> Plan:
    """Builds the tokenizer (saved in the run folder), the rows, and the arms; loads the student once for its size."""
    from distill_llm.core.processes import main_first

    main_first(lambda: _save_tokenizer(recipe, material, run))
    student = build_student(recipe.student, read_tokenizer(str(run.tokenizer), where="student.tokenizer"))
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
    size = student.num_parameters
    sizes = {name: teacher.num_parameters(size) for name, teacher in recipe.teachers.items() if is_asked(recipe, name)}
    return Plan(plan_arms(recipe, rows.rows, student_parameters=size, teacher_parameters=sizes), rows)


def make_trial(recipe: Recipe, material: Material, plan: Plan, run: RunFolder, arm: Arm, rate: float) -> Trial:
    return Trial(
        arm=arm,
        learning_rate=rate,
        recipe=recipe,
        rows=arm.rows_of(plan.rows.rows),
        validation=material.splits.validation,
        tokenizer=run.tokenizer,
        folder=run.arm(arm.name) / f"rate-{rate:g}",
    )


def train_arms(
    recipe: Recipe, material: Material, plan: Plan, run: RunFolder, names: Sequence[str], progress: Progress
) -> None:
    """Trains the named arms that are not trained yet. Each has every learning rate of ``tune``; validation picks."""
    if all(example.label is None for example in material.splits.validation):
        progress.say("no validation example has a label: nothing is validated, and the last step is kept")
    waiting = [arm for arm in choose(plan.arms, names) if not _is_trained(arm, run)]
    rates = recipe.train.tune or (recipe.train.learning_rate,)
    trials = [make_trial(recipe, material, plan, run, arm, rate) for arm in waiting for rate in rates]
    for arm in waiting:
        write_json(run.arm(arm.name) / "plan.json", _plan_facts(arm))
    results = run_trials(trials, recipe.train.workers, progress)
    for arm in waiting:
        own = [(trial, result) for trial, result in zip(trials, results, strict=True) if trial.arm.name == arm.name]
        _keep_best(arm, own, run)


def _plan_facts(arm: Arm) -> dict[str, Any]:
    terms = [term.model_dump(mode="json") for term in arm.terms]
    return {"description": arm.description, "max_steps": arm.max_steps, "terms": terms, "target": arm.evaluate_target}


def _is_trained(arm: Arm, run: RunFolder) -> bool:
    """Raises ConfigError where the folder holds an arm of this name with another plan."""
    path = run.arm(arm.name) / "plan.json"
    if path.exists() and fingerprint(read_json(path)) != fingerprint(_plan_facts(arm)):
        raise ConfigError(
            f"{run.arm(arm.name)}: this arm was planned otherwise ({path.name} says how). Delete the folder to train "
            "it anew, or give the arm another name."
        )
    return run.result(arm.name).exists()


def _keep_best(arm: Arm, trials: Sequence[tuple[Trial, dict[str, Any]]], run: RunFolder) -> None:
    """Moves the model with the best validation accuracy up to the arm's folder. Only the main process does."""
    from distill_llm.core.processes import is_main_process

    if not is_main_process():
        return
    best, result = max(trials, key=lambda pair: pair[1]["validation_accuracy"] or 0.0)
    with storage(run.model(arm.name)):
        if (best.folder / "model").exists():
            shutil.rmtree(run.model(arm.name), ignore_errors=True)
            (best.folder / "model").rename(run.model(arm.name))
    write_json(
        run.result(arm.name),
        _plan_facts(arm) | {"role": arm.role} | result | {"trials": [result for _, result in trials]},
    )
    for trial, _ in trials:
        shutil.rmtree(trial.folder, ignore_errors=True)


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
    prefixes = recipe.student.prefixes
    for target in ("label", "rationale", "rationale_then_label"):
        yield prefixes.of(target)
    for example in material.splits.train:
        answer = material.answers.get(example.id)
        yield example.input
        for target in needed_targets(recipe):
            yield from target_texts(example, answer, target, task=recipe.task, label_from=recipe.label_from)
