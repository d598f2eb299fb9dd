"""The command line. Nothing heavy is imported before a command needs it, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from distill_llm.cli import recipes, shipping
from distill_llm.cli.terminal import Overrides, RecipePath, RunPath, be_quiet, console, plain, progress_bars, show_next
from distill_llm.core.errors import BudgetReached, DistillError, Interrupted, TeacherError
from distill_llm.core.processes import is_main_process, world_size
from distill_llm.core.quiet import quiet_libraries

if TYPE_CHECKING:
    from distill_llm.evaluation.scorecard import Scorecard
    from distill_llm.recipe.recipe import Recipe

QUICKSTART = ("teacher", "scarce", "ample")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distill a language model step by step: a teacher's rationales, a small student, and a scorecard that says "
    "whether it was worth it.",
)
app.add_typer(recipes.app, name="recipe")
app.add_typer(shipping.app)

Retrain = Annotated[
    bool,
    typer.Option("--retrain", help="set models that the recipe would train otherwise aside, and train them anew"),
]


@app.command()
def quickstart(overrides: Overrides = None) -> None:
    """The whole product in small: a teacher, its rationales, students, controls, a verdict. About four minutes."""
    cards = []
    for number, name in enumerate(QUICKSTART, start=1):
        path = f"recipes/quickstart/{name}.yaml"
        console().print(f"\n[bold]{number}/{len(QUICKSTART)}  distill-llm run {path}[/bold]")
        cards.append(_run(path, overrides or []))
    for name, (card, folder) in zip(QUICKSTART[1:], cards[1:], strict=True):
        console().print(f"\n[bold]The {name} case[/bold]")
        _show(card, folder)
    console().print(
        "\nOpen the recipes, change them, run them by hand: [bold]distill-llm recipe show "
        "recipes/quickstart/scarce.yaml[/bold]\nYour own data: [bold]distill-llm run recipes/my-data.yaml[/bold]",
        highlight=False,
    )


@app.command("generate-rationales")
def generate_rationales(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show a prompt, requests and cost; ask nothing")] = False,
) -> None:
    """Stage one: ask the teacher for rationales and labels. Resumes; nothing is asked twice; works under torchrun."""
    from distill_llm.cli.rationales import show_preview
    from distill_llm.pipeline.run import generate_rationales as generate
    from distill_llm.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        from distill_llm.pipeline.preview import preview_rationales

        show_preview(preview_rationales(loaded), console())
        return
    with _telling_what_was_spent(loaded), progress_bars() as progress:
        run = generate(loaded, progress=progress)
    if not is_main_process():
        return
    _show_rationales(run.root)
    console().print(f"Rationales: {run.rationales('train')}", highlight=False)
    show_next(f"distill-llm train {shlex.join([recipe, *(overrides or [])])}")


@app.command("cache-signals")
def cache_signals(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Write what cached and captured teachers say of the training rows, once. Resumes; works under torchrun."""
    from distill_llm.cli.cache import show_caches
    from distill_llm.pipeline.run import cache_signals as cache
    from distill_llm.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    with progress_bars() as progress:
        reports = cache(loaded, progress=progress)
    show_caches(reports, console())
    show_next(f"distill-llm train {shlex.join([recipe, *(overrides or [])])}")


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    arm: Annotated[list[str] | None, typer.Option(help="which models to train: student, all, or a name")] = None,
    retrain: Retrain = False,
) -> None:
    """Stage two: train the student (or its controls). Resumes from the last checkpoint; works under torchrun."""
    from distill_llm.pipeline.run import train as train_student
    from distill_llm.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    with progress_bars() as progress:
        run = train_student(loaded, arms=arm or ["student"], retrain=retrain, progress=progress)
    console().print(f"Trained: {', '.join(run.trained_arms())}, in {run.models}", highlight=False)
    show_next(f"distill-llm evaluate {run.root}")


@app.command()
def evaluate(
    run: RunPath,
    overrides: Overrides = None,
) -> None:
    """Stage three: score every trained model of a run on its test split."""
    from distill_llm.pipeline.run import evaluate as evaluate_run

    with progress_bars() as progress:
        card = evaluate_run(run, overrides=overrides or [], progress=progress)
    _show(card, Path(run))


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None, retrain: Retrain = False) -> None:
    """All stages, with ablations and controls. Resumes at the first that is unfinished."""
    card, folder = _run(recipe, overrides or [], retrain=retrain)
    _show_rationales(folder)
    _show(card, folder)


@app.command()
def sweep(
    recipe: RecipePath,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=[VALUE,...]...", help="keys to vary, and overrides for all runs")
    ] = None,
    seeds: Annotated[int, typer.Option(help="training seeds of each setting; their mean decides")] = 1,
    sample: Annotated[int, typer.Option(help="try so many settings of the grid, drawn at random; 0: all")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the runs; run nothing")] = False,
) -> None:
    """Try teachers, temperatures, sizes or any other key; validation picks, the pick is scored on test. Resumes."""
    from distill_llm.cli.sweep import show_grid, show_sweep
    from distill_llm.pipeline.sweep_grid import plan_sweep
    from distill_llm.recipe.load import read_recipe

    plan = plan_sweep(read_recipe(recipe), settings or [], seeds=seeds, sample=sample, source=recipe)
    if dry_run:
        show_grid(plan, console())
        return
    from distill_llm.pipeline.sweep import run_sweep

    with progress_bars() as progress:
        report = run_sweep(plan, progress)
    show_sweep(report, plan.folder, console())


@app.command()
def doctor(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Examine a recipe before hours are spent on it. Exit code 0: it may run; 1: it may not."""
    from distill_llm.cli.doctor import show_diagnosis
    from distill_llm.pipeline.doctor import examine
    from distill_llm.recipe.load import load_recipe

    diagnosis = examine(load_recipe(recipe, overrides or []))
    show_diagnosis(diagnosis, console())
    if not diagnosis.may_run:
        raise typer.Exit(1)


@app.command()
def tasks() -> None:
    """The tasks that a recipe may name, with their metric and licence."""
    from rich.table import Table

    from distill_llm.core.component import kinds
    from distill_llm.tasks.base import Task

    table = Table("kind", "what it is", "answers", "licence of the data", box=None, pad_edge=False)
    for kind, task in kinds(Task, "distill_llm.tasks").items():
        table.add_row(kind, task.title, task.answer, task.licence)
    console().print(table)


def _run(recipe: str, overrides: Sequence[str], *, retrain: bool = False) -> tuple[Scorecard, Path]:
    from distill_llm.pipeline.run import run as run_recipe
    from distill_llm.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    with _telling_what_was_spent(loaded), progress_bars() as progress:
        return run_recipe(loaded, retrain=retrain, progress=progress), loaded.folder


@contextmanager
def _telling_what_was_spent(recipe: Recipe) -> Iterator[None]:
    """Where asking a teacher ends early, too."""
    from distill_llm.cli.rationales import show_ledger
    from distill_llm.pipeline.run import report_spent

    try:
        yield
    except (BudgetReached, TeacherError, KeyboardInterrupt):
        if recipe.rationales is not None:
            show_ledger(report_spent(recipe), console())
        raise


def _show_rationales(folder: Path) -> None:
    """What became of what the teacher was asked, and what it took; nothing where nobody was asked."""
    from distill_llm.cli.rationales import show_funnel, show_ledger
    from distill_llm.core.files import read_json
    from distill_llm.pipeline.run_folder import RunFolder

    files = RunFolder(folder)
    if files.funnel.exists():
        show_funnel(read_json(files.funnel), console())
        show_ledger(read_json(files.spent), console())


def _show(card: Scorecard, folder: Path) -> None:
    from distill_llm.evaluation.avalanche import in_words, to_avalanche_table
    from distill_llm.evaluation.classes import class_table
    from distill_llm.evaluation.scorecard import to_comparison_table, to_table

    shown = console()
    shown.print()
    shown.print(to_table(card))
    if any(one.left_out for one in card.classes):
        shown.print(class_table(card.classes))
    if card.comparisons:
        shown.print()
        shown.print(to_comparison_table(card))
    if card.avalanche is not None:
        shown.print()
        shown.print(to_avalanche_table(card.avalanche))
        shown.print(in_words(card.avalanche), highlight=False)
    shown.print(f"\n[bold]{card.verdict}[/bold]", highlight=False)
    shown.print(f"Run folder: {folder} (scorecard.md has the notes)", highlight=False)
    shown.print(f"The student: {folder / 'models' / 'student' / 'model'}", highlight=False)


def _version(wanted: bool) -> None:
    if wanted:
        from distill_llm import __version__

        typer.echo(f"distill-llm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="no progress: only results and errors, for logs")
    ] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="show it")] = False,
) -> None:
    del version  # its callback has shown it
    be_quiet(quiet)
    quiet_libraries()  # before a command imports them


def main() -> NoReturn:
    """Runs the command line. Exit codes: 0 done, 1 failed, 2 wrong use or recipe, 3 budget used up, 130 interrupted."""
    with _terminated_like_interrupted():
        try:
            code = app(standalone_mode=False)  # what a typer.Exit says, else nothing
        except typer.Exit as done:
            sys.exit(done.exit_code)
        except (KeyboardInterrupt, Interrupted, typer.Abort) as stopped:
            _end_interrupted(str(stopped))
        except DistillError as error:
            _say_error(str(error))
            sys.exit(error.exit_code)
        except typer.TyperException as error:  # wrong use
            _show_usage(error)
            sys.exit(2)
        if code == Interrupted.exit_code:  # all that typer makes of a KeyboardInterrupt
            _end_interrupted()
    sys.exit(code if isinstance(code, int) else 0)


def _end_interrupted(reason: str = "") -> NoReturn:
    _say_error(reason or "interrupted; what was finished is kept.")
    if is_main_process():
        Console(stderr=True).print(f"To go on: [bold]{plain(_typed())}[/bold]", highlight=False, soft_wrap=True)
    sys.exit(Interrupted.exit_code)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _typed() -> str:
    """The command that resumes: the one that was typed."""
    if world_size() > 1:
        return "the same torchrun command"
    return shlex.join(["distill-llm", *sys.argv[1:]])


def _say_error(message: str) -> None:
    rank = os.environ.get("RANK", "0")  # an error of another process may be the only one that says why all stopped
    process = "" if rank == "0" else f" (process {rank})"
    Console(stderr=True).print(f"[red]error{process}:[/red] {plain(message)}", highlight=False, soft_wrap=True)


def _show_usage(error: Exception) -> None:
    """What typer says of wrong use: the usage line and the reason."""
    show = getattr(error, "show", None)
    if callable(show):
        show()
    else:
        _say_error(str(error))


if __name__ == "__main__":
    main()
