"""What the command line shows of a sweep: its grid beforehand, its table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from distill_llm.evaluation.sweep_report import SweepReport
    from distill_llm.pipeline.sweep_grid import SweepPlan


def show_grid(plan: SweepPlan, console: Console) -> None:
    """Every run that the sweep would make, and which are there."""
    from distill_llm.pipeline.run_folder import RunFolder

    several = len(plan.seeds) > 1
    table = Table(*(axis.name for axis in plan.axes), *(["seed"] if several else []), "is", box=None, pad_edge=False)
    there = 0
    for setting, seed, recipe in plan.runs:
        run = RunFolder(recipe.folder)
        done = run.result("student").exists()
        there += done
        state = "trained" if done else "begun" if run.training_has_begun else "to be trained"
        table.add_row(*map(_plain, plan.shown(setting)), *([str(seed)] if several else []), state)
    console.print(table)
    for axis in plan.axes:
        console.print(f"{axis.name}: {' and '.join(axis.keys)}", markup=False, highlight=False, soft_wrap=True)
    sampled = f" of {plan.grid_size}" if len(plan.settings) < plan.grid_size else ""
    seeds = f" x {len(plan.seeds)} seeds" if several else ""
    console.print(
        f"{len(plan.settings)}{sampled} settings{seeds} = {len(plan.runs)} runs, {there} of them trained already; then "
        "the chosen one's controls. Nothing was run, nothing was written.",
        highlight=False,
    )


def show_sweep(report: SweepReport, folder: Path, console: Console) -> None:
    """The settings, what to take, and what that comes to on test."""
    from distill_llm.evaluation.sweep_report import to_table, to_test_table

    console.print()
    console.print(to_table(report))
    console.print(f"\n[bold]{_plain(report.advice)}[/bold]", highlight=False)
    console.print(f"\nThe chosen one, and it alone, on {report.test_examples:,} test examples:", highlight=False)
    console.print(to_test_table(report))
    for verdict in report.verdicts if len(report.verdicts) == 1 else ():
        console.print(f"\n[bold]{_plain(verdict)}[/bold]", highlight=False)
    files = [path for path in (folder / "sweep.md", folder / "sweep.png") if path.exists()]
    console.print()
    for path in [*files, *report.scorecards]:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
