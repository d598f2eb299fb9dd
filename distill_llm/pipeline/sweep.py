"""A sweep: many runs of one recipe, of which validation chooses one; that one alone is scored on test.

Its runs are ordinary run folders under ``runs/<name>/sweep/runs``. Those that ask a teacher of text for the same share
one rationale data set, and all share the journal of the recipe's own run folder, by symbolic links.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import ConfigError
from distill_llm.core.example import Splits
from distill_llm.core.extras import is_there
from distill_llm.core.files import fingerprint, read_json, storage, write_json
from distill_llm.core.progress import SILENT, Progress
from distill_llm.core.quiet import quiet_libraries
from distill_llm.pipeline.arms import STUDENT
from distill_llm.pipeline.rationale_stage import check, check_training, load_examples, made_of
from distill_llm.pipeline.run import cache_signals, generate_rationales, in_one_process, run, train
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.sweep_grid import Setting, SweepPlan, plan_sweep
from distill_llm.pipeline.sweep_progress import AllRuns, OneRun, Prefixed, naming
from distill_llm.recipe.recipe import Recipe

if TYPE_CHECKING:
    from distill_llm.evaluation.scorecard import Scorecard
    from distill_llm.evaluation.sweep_report import SweepReport

PLOT = "sweep.png"


@dataclass(frozen=True, slots=True)
class _Source:
    """One rationale data set, or none, as examples and teacher make it: a recipe that asks for it, in its folder."""

    recipe: Recipe
    runs: list[Recipe]


def sweep(
    recipe: Recipe, settings: Sequence[str], *, seeds: int = 1, sample: int = 0, progress: Progress = SILENT
) -> SweepReport:
    """Trains the recipe's student with every combination of ``settings``, such as ``["train.epochs=[1, 2]"]``, and
    ``seeds`` training seeds each; takes the best mean validation accuracy; scores that one on test with its controls.

    Resumes at the first unfinished run. Writes sweep.md, sweep.json and, with matplotlib, sweep.png.
    """
    data = recipe.model_dump(mode="json")
    return run_sweep(plan_sweep(data, settings, seeds=seeds, sample=sample, source=recipe.name), progress)


def run_sweep(plan: SweepPlan, progress: Progress = SILENT) -> SweepReport:
    """The same, of a plan."""
    in_one_process("sweep")
    quiet_libraries()
    sources, splits = _check(plan)
    if not is_there("matplotlib"):
        progress.say("matplotlib is not installed: there will be a table and no plot (pip install 'distill-llm[plot]')")
    for source in sources:
        _gather(plan, source, progress)
    results = _train(plan, progress)
    return _report(plan, results, splits, progress)


def result_of(recipe: Recipe) -> dict[str, Any] | None:
    """What a run's student came to; None where it is not trained yet."""
    path = RunFolder(recipe.folder).result(STUDENT)
    return read_json(path) if path.exists() else None


def _check(plan: SweepPlan) -> tuple[list[_Source], Splits]:
    """Everything that some run names is there, and all are judged by the same examples. Loads no weights."""
    from distill_llm.pipeline.score_stage import check_test_labels

    sources: dict[str, _Source] = {}
    judged: dict[str, Setting] = {}
    first: Splits | None = None
    for setting in plan.settings:
        recipe = setting.recipes[0]
        with naming(plan.label(setting)):
            splits = load_examples(recipe)
            _check_validation(recipe, splits)
            check_test_labels(splits)
            check_training(recipe, splits)
            key = _source_key(recipe, splits)
            if key not in sources:
                sources[key] = _Source(_asking(plan, recipe, key), [])
                check(sources[key].recipe, student=False)
        sources[key].runs.extend(setting.recipes)
        first = first or splits
        judged.setdefault(fingerprint([[one.id, one.label] for one in splits.validation]), setting)
    assert first is not None
    if len(judged) > 1:
        one, other = (" ".join(setting.overrides) for setting in list(judged.values())[:2])
        raise ConfigError(f"sweep: {one} and {other} have other validation examples: they cannot be compared.")
    if len(sources) > 1 and any(example.label is None for example in first.validation):
        raise ConfigError(
            "sweep: validation examples without a label take the votes of their teacher, and here the teachers differ: "
            "each student would be measured by its own. Give labelled validation data, or vary something else."
        )
    return list(sources.values()), first


def _check_validation(recipe: Recipe, splits: Splits) -> None:
    if recipe.label_from == "gold" and all(example.label is None for example in splits.validation):
        raise ConfigError(
            "no validation example has a label, so that nothing can choose. Give labelled validation data "
            "(validation_data for jsonl), or let the teacher's votes serve (label_from=gold_else_teacher)."
        )


def _source_key(recipe: Recipe, splits: Splits) -> str:
    """Changes with what a teacher of text is asked, and about which examples."""
    asked = made_of(recipe, recipe.rationales) if recipe.rationales is not None else ""
    return fingerprint([asked, [[one.id for one in split] for split in (splits.train, splits.validation, splits.test)]])


def _asking(plan: SweepPlan, recipe: Recipe, key: str) -> Recipe:
    """The recipe that asks for a source's rationales, and leaves the test split to the run that is chosen."""
    evaluate = recipe.evaluate.model_copy(update={"teacher": False})
    folder = plan.main.sweep / "rationales" / key
    return recipe.model_copy(update={"run_dir": str(folder), "evaluate": evaluate})


def _gather(plan: SweepPlan, source: _Source, progress: Progress) -> None:
    """Asks for what the journals do not hold, once for all runs of the source, and links the data set to them."""
    if source.recipe.rationales is None:
        return
    own, shared = plan.main, RunFolder(source.recipe.folder)
    with storage(own.rationale_folder):
        own.rationale_folder.mkdir(parents=True, exist_ok=True)
        own.journal().touch()
    if not own.ledger().exists():
        write_json(own.ledger(), {})
    for path in (*own.journals(), *own.ledgers()):
        _link(shared.rationale_folder / path.name, path)
    generate_rationales(source.recipe, progress=progress)
    for recipe in source.runs:
        _link(RunFolder(recipe.folder).rationale_folder, shared.rationale_folder)


def _link(path: Path, target: Path) -> None:
    """A relative symbolic link, so that the run folder may be moved as a whole; one that is there is kept."""
    if path.is_symlink() or path.exists():
        return
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(target, path.parent))


def _train(plan: SweepPlan, progress: Progress) -> dict[str, dict[str, Any]]:
    """The result of every run, by its folder. What is trained already is read."""
    from distill_llm.pipeline.workers import side_by_side

    runs = [(plan.label(setting, seed), recipe) for setting, seed, recipe in plan.runs]
    waiting = [(label, recipe) for label, recipe in runs if result_of(recipe) is None]
    overall = AllRuns(progress, len(runs), len(runs) - len(waiting))
    for label, recipe in waiting:  # one after another: caches may share a folder
        if any(teacher.asked_once for teacher in recipe.teachers.values()):
            with naming(label):
                cache_signals(recipe, progress=OneRun(label, overall))
    workers = plan.settings[0].recipes[0].train.workers
    side_by_side([partial(_train_one, label, recipe) for label, recipe in waiting], workers, overall)
    results = {recipe.run_dir: result_of(recipe) for _, recipe in runs}
    assert all(results.values()), "every run was trained"
    return {folder: result for folder, result in results.items() if result is not None}


def _train_one(label: str, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Trains the student of one run, its arms and rates one after another."""
    alone = recipe.model_copy(update={"train": recipe.train.model_copy(update={"workers": 1})})
    with naming(label):
        folder = train(alone, progress=OneRun(label, progress))
    result = read_json(folder.result(STUDENT))
    progress.advance(label, 1, 1, f"validation {result['validation_accuracy']:.1%}")
    return result


def _report(
    plan: SweepPlan, results: Mapping[str, Mapping[str, Any]], splits: Splits, progress: Progress
) -> SweepReport:
    """Chooses, scores the chosen one, and writes table and plot."""
    from distill_llm.evaluation import sweep_report as reports

    accuracies = [[results[one.run_dir]["validation_accuracy"] for one in setting.recipes] for setting in plan.settings]
    chosen = reports.choose(accuracies)
    axes = tuple(
        reports.AxisRecord(keys=axis.keys, name=axis.name, values=axis.values, shown=axis.shown) for axis in plan.axes
    )
    tried = tuple(_tried(setting, results) for setting in plan.settings)
    progress.say(f"chosen on validation: {plan.label(plan.settings[chosen])}; it alone is scored on test")
    cards = _score(plan, plan.settings[chosen], progress)
    report = reports.SweepReport(
        recipe=plan.recipe_name,
        metric=cards[0].metric,
        axes=axes,
        seeds=plan.seeds,
        grid_size=plan.grid_size,
        validation_examples=sum(example.label is not None for example in splits.validation) or len(splits.validation),
        test_examples=len(splits.test),
        tried=tried,
        chosen=chosen,
        advice=reports.advise(axes, tried, chosen),
        test=reports.score_test(cards),
        scorecards=tuple(f"{one.run_dir}/scorecard.md" for one in plan.settings[chosen].recipes),
        verdicts=tuple(card.verdict for card in cards),
        notes=(f"The runs are under {plan.main.sweep / 'runs'}: ordinary run folders, which may be deleted.",),
        versions=cards[0].versions,
        hardware=cards[0].hardware,
        created=cards[0].created,
    )
    _write(plan, report)
    return report


def _tried(setting: Setting, results: Mapping[str, Mapping[str, Any]]) -> Any:
    from distill_llm.evaluation.sweep_report import Tried, spread
    from distill_llm.models.folder import is_adapter
    from distill_llm.models.load import count_parameters

    found = [results[recipe.run_dir] for recipe in setting.recipes]
    middle, deviation = spread([result["validation_accuracy"] for result in found])
    model = str(RunFolder(setting.recipes[0].folder).model(STUDENT))
    return Tried(
        places=setting.places,
        overrides=setting.overrides,
        validation=tuple(result["validation_accuracy"] for result in found),
        mean=middle,
        deviation=deviation,
        parameters=count_parameters(model, where=model) if Path(model).is_dir() and not is_adapter(model) else None,
        train_seconds=round(sum(result["seconds"] for result in found) / len(found), 3),
        folders=tuple(recipe.run_dir for recipe in setting.recipes),
    )


def _score(plan: SweepPlan, setting: Setting, progress: Progress) -> list[Scorecard]:
    """The ordinary run of each seed of the chosen setting: controls, ablations, test."""
    cards = []
    for recipe, seed in zip(setting.recipes, plan.seeds, strict=True):
        name = f"seed {seed}: " if len(plan.seeds) > 1 else ""
        with naming(plan.label(setting, seed)):
            cards.append(run(recipe, progress=Prefixed(name, progress)))
    return cards


def _write(plan: SweepPlan, report: SweepReport) -> None:
    from distill_llm.evaluation.sweep_plot import save_plot
    from distill_llm.evaluation.sweep_report import save_report

    drawn = is_there("matplotlib")
    if drawn:
        save_plot(plan.folder / PLOT, report)
    else:
        (plan.folder / PLOT).unlink(missing_ok=True)  # of an earlier sweep: it would show other numbers
    save_report(plan.folder, report, plot=PLOT if drawn else "")
