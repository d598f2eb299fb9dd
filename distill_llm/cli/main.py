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

from distill_llm.cli import recipes
from distill_llm.core.errors import DistillError, Interrupted
from distill_llm.core.processes import is_main_process, world_size

if TYPE_CHECKING:
    from distill_llm.cli.progress import TerminalProgress
    from distill_llm.evaluation.scorecard import Scorecard

QUICKSTART = ("teacher", "scarce", "ample")
_wanted = {"quiet": False}
"""What the options before the command say."""

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

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file, or one that came with the package")]
Retrain = Annotated[
    bool,
    typer.Option("--retrain", help="set models that the recipe would train otherwise aside, and train them anew"),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, such as train.max_steps=100")
]


@app.command()
def quickstart(overrides: Overrides = None) -> None:
    """The whole product in small: a teacher, its rationales, students, controls, a verdict. About four minutes."""
    cards = []
    for number, name in enumerate(QUICKSTART, start=1):
        path = f"recipes/quickstart/{name}.yaml"
        _console().print(f"\n[bold]{number}/{len(QUICKSTART)}  distill-llm run {path}[/bold]")
        cards.append(_run(path, overrides or []))
    for name, (card, folder) in zip(QUICKSTART[1:], cards[1:], strict=True):
        _console().print(f"\n[bold]The {name} case[/bold]")
        _show(card, folder)
    _console().print(
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
    from distill_llm.cli.rationales import show_funnel, show_ledger, show_preview
    from distill_llm.core.files import read_json
    from distill_llm.pipeline.run import generate_rationales as generate
    from distill_llm.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        from distill_llm.pipeline.preview import preview_rationales

        show_preview(preview_rationales(loaded), _console())
        return
    with _progress() as progress:
        run = generate(loaded, progress=progress)
    if not is_main_process():
        return
    show_funnel(read_json(run.funnel), _console())
    show_ledger(read_json(run.spent), _console())
    _console().print(f"Rationales: {run.rationales('train')}", highlight=False)
    _next(f"distill-llm train {shlex.join([recipe, *(overrides or [])])}")


@app.command("push-rationales")
def push_rationales(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, such as runs/cqa-t5-base")],
    repo_id: Annotated[str, typer.Option(help="the data set's name on the Hub: owner/name")],
    public: Annotated[bool, typer.Option("--public", help="anybody may read it; private otherwise")] = False,
    licence: Annotated[str, typer.Option(help="the licence that you give the data set, such as cc-by-4.0")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would be sent; send nothing")] = False,
) -> None:
    """Push a run's rationale data set, with its card, to the Hugging Face Hub in one commit."""
    from distill_llm.cli.rationales import show_uploads
    from distill_llm.pipeline.publish import licence_warnings, plan_push
    from distill_llm.pipeline.publish import push_rationales as push

    _, recipe, files = plan_push(run)
    for warning in licence_warnings(recipe):
        _console().print(f"[yellow]warning:[/yellow] {_plain(warning)}", highlight=False, soft_wrap=True)
    if dry_run:
        show_uploads(files, _console())
        return
    pushed = push(run, repo_id, private=not public, licence=licence)
    kind = "private" if pushed.private else "public"
    done = f"Pushed ({kind})" if pushed.changed else f"Nothing to do, all of it is there ({kind})"
    _console().print(f"{done}: {pushed.url}", highlight=False, soft_wrap=True)


@app.command("cache-signals")
def cache_signals(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Write what cached and captured teachers say of the training rows, once. Resumes; works under torchrun."""
    from distill_llm.cli.cache import show_caches
    from distill_llm.pipeline.run import cache_signals as cache
    from distill_llm.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    with _progress() as progress:
        reports = cache(loaded, progress=progress)
    show_caches(reports, _console())
    _next(f"distill-llm train {shlex.join([recipe, *(overrides or [])])}")


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
    with _progress() as progress:
        run = train_student(loaded, arms=arm or ["student"], retrain=retrain, progress=progress)
    _console().print(f"Trained: {', '.join(run.trained_arms())}, in {run.models}", highlight=False)
    _next(f"distill-llm evaluate {run.root}")


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, such as runs/quickstart/scarce")],
    overrides: Overrides = None,
) -> None:
    """Stage three: score every trained model of a run on its test split."""
    from distill_llm.pipeline.run import evaluate as evaluate_run

    with _progress() as progress:
        card = evaluate_run(run, overrides=overrides or [], progress=progress)
    _show(card, Path(run))


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None, retrain: Retrain = False) -> None:
    """All stages, with ablations and controls. Resumes at the first that is unfinished."""
    card, folder = _run(recipe, overrides or [], retrain=retrain)
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
        show_grid(plan, _console())
        return
    from distill_llm.pipeline.sweep import run_sweep

    with _progress() as progress:
        report = run_sweep(plan, progress)
    show_sweep(report, plan.folder, _console())


@app.command()
def doctor(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Examine a recipe before hours are spent on it. Exit code 0: it may run; 1: it may not."""
    from distill_llm.cli.doctor import show_diagnosis
    from distill_llm.core.quiet import quiet_libraries
    from distill_llm.pipeline.doctor import examine
    from distill_llm.recipe.load import load_recipe

    quiet_libraries()
    diagnosis = examine(load_recipe(recipe, overrides or []))
    show_diagnosis(diagnosis, _console())
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
    _console().print(table)


def _run(recipe: str, overrides: Sequence[str], *, retrain: bool = False) -> tuple[Scorecard, Path]:
    from distill_llm.pipeline.run import run as run_recipe
    from distill_llm.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    with _progress() as progress:
        return run_recipe(loaded, retrain=retrain, progress=progress), loaded.folder


def _show(card: Scorecard, folder: Path) -> None:
    from distill_llm.evaluation.avalanche import in_words, to_avalanche_table
    from distill_llm.evaluation.classes import class_table
    from distill_llm.evaluation.scorecard import to_comparison_table, to_table

    console = _console()
    console.print()
    console.print(to_table(card))
    if any(one.left_out for one in card.classes):
        console.print(class_table(card.classes))
    if card.comparisons:
        console.print()
        console.print(to_comparison_table(card))
    if card.avalanche is not None:
        console.print()
        console.print(to_avalanche_table(card.avalanche))
        console.print(in_words(card.avalanche), highlight=False)
    console.print(f"\n[bold]{card.verdict}[/bold]", highlight=False)
    console.print(f"Run folder: {folder} (scorecard.md has the notes)", highlight=False)
    console.print(f"The student: {folder / 'models' / 'student' / 'model'}", highlight=False)


def _next(command: str) -> None:
    _console().print(f"Next: [bold]{command}[/bold]", highlight=False)


def _console() -> Console:
    return Console(quiet=not is_main_process())


def _progress() -> TerminalProgress:
    from distill_llm.cli.progress import TerminalProgress

    return TerminalProgress(Console(quiet=_wanted["quiet"] or not is_main_process()))


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
    _wanted["quiet"] = quiet


def main() -> NoReturn:
    """Runs the command line. Exit codes: 0 done, 1 failed, 2 wrong use or recipe, 3 budget used up, 130 interrupted."""
    with _terminated_like_interrupted():
        try:
            code = app(standalone_mode=False)  # what a typer.Exit says, else nothing
        except typer.Exit as done:
            sys.exit(done.exit_code)
        except (KeyboardInterrupt, Interrupted, typer.Abort) as stopped:
            _say_error(str(stopped) or "interrupted; what was finished is kept.")
            if is_main_process():
                Console(stderr=True).print(f"To go on: [bold]{_typed()}[/bold]", highlight=False, soft_wrap=True)
            sys.exit(Interrupted.exit_code)
        except DistillError as error:
            _say_error(str(error))
            sys.exit(error.exit_code)
        except typer.TyperException as error:  # wrong use
            _show_usage(error)
            sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


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
    Console(stderr=True).print(f"[red]error{process}:[/red] {_plain(message)}", highlight=False, soft_wrap=True)


def _show_usage(error: Exception) -> None:
    """What typer says of wrong use: the usage line and the reason."""
    show = getattr(error, "show", None)
    if callable(show):
        show()
    else:
        _say_error(str(error))


def _plain(message: str) -> str:
    from rich.markup import escape

    return escape(message)


if __name__ == "__main__":
    main()
