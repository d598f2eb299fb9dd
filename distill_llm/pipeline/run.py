"""A recipe from end to end: rationales, students, scorecard. Each stage goes on where it was left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import ConfigError
from distill_llm.core.example import Splits
from distill_llm.core.processes import main_first, world_size
from distill_llm.core.progress import SILENT, Progress
from distill_llm.core.quiet import quiet_libraries
from distill_llm.pipeline.asking import spent_in
from distill_llm.pipeline.rationale_stage import PATIENCE, Material, check, gather, load_examples, read_material
from distill_llm.pipeline.run_folder import RunFolder, claim, open_run
from distill_llm.pipeline.standing import settled
from distill_llm.pipeline.transfer import transferred
from distill_llm.pipeline.views import facts_of_views
from distill_llm.recipe.recipe import Recipe
from distill_llm.schemes.stages import STUDENT

if TYPE_CHECKING:
    from distill_llm.evaluation.scorecard import Scorecard
    from distill_llm.pipeline.cache_stage import CacheReport
    from distill_llm.pipeline.student_stage import Plan
    from distill_llm.training.trainer import DistillTrainer


def generate_rationales(recipe: Recipe, *, progress: Progress = SILENT) -> RunFolder:
    """Asks the recipe's teacher for rationales and labels, and writes them to the run folder.

    Completions that the folder's journal holds are not asked for again. Under torchrun each process asks its share.
    """
    quiet_libraries()
    recipe = recipe.resolved()
    if recipe.rationales is None:
        raise ConfigError(f"recipe {recipe.name} has no `rationales` section: there is no teacher to ask.")
    splits = check(recipe, student=False)
    main_first(lambda: claim(recipe) and None, patience=PATIENCE)
    run = RunFolder(recipe.folder)
    gather(recipe, splits, run, progress)
    return run


def report_spent(recipe: Recipe) -> dict[str, Any]:
    """What asking the recipe's teacher came to so far, in all and by the latest command that asked, finished or not."""
    if recipe.rationales is None:
        raise ConfigError(f"recipe {recipe.name} has no `rationales` section: there is no teacher to ask.")
    return spent_in(RunFolder(recipe.folder), recipe.rationales)


def cache_signals(recipe: Recipe, *, progress: Progress = SILENT) -> list[CacheReport]:
    """Writes what the recipe's cached and captured teachers say of the training rows; rows that are there are not
    computed again.

    Needs the rationales to be there. Works in one process and under torchrun.
    """
    from distill_llm.pipeline.cache_stage import write_caches
    from distill_llm.pipeline.student_stage import make_plan

    quiet_libraries()
    recipe = recipe.resolved()
    if not any(teacher.asked_once for teacher in recipe.teachers.values()):
        raise ConfigError(
            f"recipe {recipe.name} has no teacher of `kind: cached` or `captured` among {sorted(recipe.teachers)}: "
            "there is nothing to write. docs/cache.md shows one."
        )
    main_first(lambda: None, patience=PATIENCE)  # one process may be through with its share long before another
    run, material = _claim_with_material(recipe)
    recipe = settled(recipe, run, progress)
    material = transferred(recipe, material)
    plan = make_plan(recipe, material, run)
    captures = _write_captures(recipe, plan, material, run)
    return [*write_caches(recipe, plan.rows.rows, run, progress), *captures]


def train(
    recipe: Recipe, *, arms: Sequence[str] = (STUDENT,), retrain: bool = False, progress: Progress = SILENT
) -> RunFolder:
    """Trains the student (or other arms, or ``all``) on rationales that are there already.

    Works in one process and under torchrun. Raises ConfigError where the rationales are missing, or where the folder
    has arms that this recipe would train otherwise; with ``retrain`` these are set aside, and trained anew.
    """
    quiet_libraries()
    recipe = recipe.resolved()
    run, material = _claim_with_material(recipe)
    _train(settled(recipe, run, progress), material, run, arms, progress, writes_caches=False, retrain=retrain)
    return run


def student_trainer(recipe: Recipe) -> DistillTrainer:
    """The trainer that ``train`` would use for the student: a transformers.Trainer, for callbacks of your own.

    Needs the rationales to be there. ``trainer.train()`` trains ``trainer.model`` and writes checkpoints to the run
    folder; the run's scorecard knows only of models that ``train`` or ``run`` finished.
    """
    from distill_llm.pipeline.cache_stage import require_caches
    from distill_llm.pipeline.plan_facts import settle
    from distill_llm.pipeline.student_stage import make_plan, make_trial
    from distill_llm.pipeline.trial import make_trial_trainer

    quiet_libraries()
    recipe = recipe.resolved()
    run, material = _claim_with_material(recipe)
    recipe = settled(recipe, run, SILENT)
    material = transferred(recipe, material)
    plan = make_plan(recipe, material, run)
    settle(recipe, plan.arms, run, retrain=False)
    missing = [name for name in plan.arms[0].after if not run.result(name).exists()]
    if missing:
        raise ConfigError(
            f"scheme: the student needs the stages {missing}, which are not trained yet. First type: distill-llm train "
            f"RECIPE --arm {missing[-1]}"
        )
    require_caches(recipe, plan.rows.rows, run)
    _write_captures(recipe, plan, material, run)
    return make_trial_trainer(make_trial(recipe, material, plan, run, plan.arms[0], recipe.train.learning_rate))


def evaluate(run_dir: str | Path, *, overrides: Sequence[str] = (), progress: Progress = SILENT) -> Scorecard:
    """Scores every trained model of a run folder on its test split, and writes the scorecard."""
    from distill_llm.pipeline.score_stage import score

    in_one_process("evaluate")
    quiet_libraries()
    run, recipe = open_run(run_dir, overrides)
    return score(recipe, _material_of(recipe, load_examples(recipe), run), run, progress)


def run(recipe: Recipe, *, retrain: bool = False, progress: Progress = SILENT) -> Scorecard:
    """All stages: rationales, the student with its ablations and controls, the scorecard. Resumes at the first that is
    unfinished; ``retrain`` is that of ``train``."""
    from distill_llm.pipeline.score_stage import check_test_labels, score

    in_one_process("run")
    quiet_libraries()
    recipe = recipe.resolved()
    splits = check(recipe)
    check_test_labels(splits)  # before hours are spent on what could not be scored
    folder = claim(recipe)
    gather(recipe, splits, folder, progress)
    material = _material_of(recipe, splits, folder)
    settled_recipe = settled(recipe, folder, progress)
    _train(settled_recipe, material, folder, ["all"], progress, writes_caches=True, retrain=retrain)
    return score(recipe, material, folder, progress)


def _train(
    recipe: Recipe,
    material: Material,
    run: RunFolder,
    arms: Sequence[str],
    progress: Progress,
    *,
    writes_caches: bool,
    retrain: bool,
) -> None:
    from distill_llm.pipeline.cache_stage import require_caches, write_caches
    from distill_llm.pipeline.needs import say_needs
    from distill_llm.pipeline.plan_facts import settle
    from distill_llm.pipeline.student_stage import make_plan, train_arms

    everything, material = material, transferred(recipe, material)
    if recipe.transfer is not None:
        there, left = len(everything.splits.train), len(material.splits.train)
        progress.say(f"transfer: the student sees {left:,} of {there:,} training examples")
    plan = make_plan(recipe, material, run)
    aside: list[str] = []
    main_first(lambda: aside.extend(settle(recipe, plan.arms, run, retrain=retrain)))
    if aside:
        progress.say(f"set aside in {run.models / '.before'}: {', '.join(aside)}")
    rows = plan.rows
    counts = ", ".join(f"{number:,} {target}" for target, number in rows.count().items())
    cut = f"; cut to fit: {rows.inputs_cut:,} inputs, {rows.targets_cut:,} targets"
    progress.say(f"rows: {counts}{cut if rows.inputs_cut or rows.targets_cut else ''}")
    for name, facts in facts_of_views(recipe, rows.rows).items():
        progress.say(f"teacher {name}: {facts}")
    for report in _write_captures(recipe, plan, material, run):
        progress.say(f"signals of {report.name}: captured at {report.known:.1%} of {report.tokens:,} tokens")
    if writes_caches:
        for report in write_caches(recipe, rows.rows, run, progress):
            progress.say(f"signals of {report.name}: {report.rows:,} rows, {report.there:,} of them there already")
    else:
        main_first(lambda: require_caches(recipe, rows.rows, run))
    say_needs(recipe, plan.arms, run, progress)
    train_arms(recipe, material, plan, run, arms, progress)


def _write_captures(recipe: Recipe, plan: Plan, material: Material, run: RunFolder) -> list[CacheReport]:
    """What came with the rationales, as a cache; in the main process alone, which reports."""
    from distill_llm.pipeline.capture_stage import write_captures

    reports: list[CacheReport] = []
    main_first(lambda: reports.extend(write_captures(recipe, plan.rows.rows, material.splits.train, run)))
    return reports


def _material_of(recipe: Recipe, splits: Splits, run: RunFolder) -> Material:
    material = read_material(recipe, splits, run)
    if material is None:
        raise ConfigError(
            f"{run.root}: the rationales are not there yet. First type: distill-llm generate-rationales RECIPE"
        )
    return material


def _claim_with_material(recipe: Recipe) -> tuple[RunFolder, Material]:
    """The run folder, claimed by the main process, and what its first stage wrote."""
    splits = check(recipe)
    main_first(lambda: claim(recipe) and None)
    run = RunFolder(recipe.folder)
    return run, _material_of(recipe, splits, run)


def in_one_process(command: str) -> None:
    """Raises ConfigError under torchrun."""
    if world_size() > 1:
        raise ConfigError(
            f"`{command}` works in one process. Run it without torchrun; under torchrun use `distill-llm "
            "generate-rationales` and `distill-llm train`, which share their work among all processes."
        )
