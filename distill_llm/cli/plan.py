"""How the command line shows a plan."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from distill_llm.cli.terminal import plain
from distill_llm.evaluation.text_tables import short_bytes, short_count

if TYPE_CHECKING:
    from distill_llm.pipeline.plan_advice import Advice
    from distill_llm.pipeline.planner import Plan

_HOUR, _MINUTE = 3600, 60


def show_plan(plan: Plan, console: Console) -> None:
    _show_models(plan, console)
    _show_memory(plan, console)
    _show_disk(plan, console)
    _show_tokens(plan, console)
    _show_time(plan, console)


def show_verdict(plan: Plan, advice: Sequence[Advice], typed: Sequence[str], console: Console) -> None:
    """``typed``: the recipe and its overrides, to paste others behind."""
    peak = plan.memories.peak
    size = f"{short_bytes(peak.total)} of memory ({peak.name}) against {short_bytes(plan.limit)} ({plan.limit_from})"
    if plan.fits:
        console.print(f"\n[bold]It fits:[/bold] {plain(size)}.", highlight=False, soft_wrap=True)
        return
    console.print(f"\n[bold]It does not fit:[/bold] {plain(size)}.", highlight=False, soft_wrap=True)
    disk = sum(plan.disk.values())
    if disk > plan.free_disk:
        said = f"Disk: {short_bytes(disk)} are needed, {short_bytes(plan.free_disk)} are free. Set run_dir elsewhere."
        console.print(said, highlight=False)
    if not advice:
        return
    console.print("What to change, each planned anew (* what is learned may differ):", highlight=False)
    for one in advice:
        fits = "fits" if one.fits else "too much still"
        mark = " *" if one.changes else ""
        console.print(f"  {short_bytes(one.peak):>8}  {fits}: {one.why}{mark}", highlight=False, soft_wrap=True)
        words = " ".join([*filter(None, [one.environment]), *map(shlex.quote, one.overrides)])
        console.print(f"            [bold]{plain(words)}[/bold]", highlight=False, soft_wrap=True)
    best = next((one for one in advice if one.fits), None)
    if best is not None:
        command = shlex.join(["distill-llm", "run", *typed, *best.overrides])
        command = f"{best.environment} {command}".lstrip()
        console.print(f"Next: [bold]{plain(command)}[/bold]", highlight=False, soft_wrap=True)


def _show_models(plan: Plan, console: Console) -> None:
    table = _table("training", "parameters", "trained", "steps", "rows x input + target tokens", "computes in")
    for stage in plan.memories.stages:
        costs = stage.costs
        rows, read, written = costs.largest_batch
        table.add_row(
            stage.arm.name,
            short_count(costs.parameters),
            short_count(costs.learned),
            f"{stage.arm.max_steps:,}",
            f"{rows} x ({read} + {written})",
            costs.computes_in,
        )
    console.print(table)
    for name, costs in plan.memories.writing.items():
        console.print(f"{plain(name)} of rationales: {short_count(costs.parameters)} parameters", highlight=False)
    console.print(f"rows: {plan.rows.source}", markup=False, highlight=False, soft_wrap=True)


def _show_memory(plan: Plan, console: Console) -> None:
    console.print(f"\n[bold]Memory[/bold] at the peak of each part, on {plain(plan.machine.name)}", highlight=False)
    moments = plan.memories.moments
    kinds = list(dict.fromkeys(kind for moment in moments for kind in moment.parts))
    table = _table("MB", *(_short(moment.name) for moment in moments))
    for kind in kinds:
        sizes = (moment.parts.get(kind, 0) for moment in moments)
        table.add_row(kind, *(f"{size / 1e6:,.1f}" if size else "" for size in sizes))
    if any(moment.processes > 1 for moment in moments):
        table.add_row("processes", *(str(moment.processes) for moment in moments))
    table.add_row("all", *(f"{moment.total / 1e6:,.1f}" for moment in moments), style="bold")
    console.print(table)


def _show_disk(plan: Plan, console: Console) -> None:
    parts = ", ".join(f"{name} {short_bytes(size)}" for name, size in plan.disk.items())
    total = short_bytes(sum(plan.disk.values()))
    console.print(
        f"\n[bold]Disk[/bold]: {total} at most, of {short_bytes(plan.free_disk)} free: {parts}",
        highlight=False,
        soft_wrap=True,
    )


def _show_tokens(plan: Plan, console: Console) -> None:
    preview = plan.preview
    if preview is None:
        console.print("[bold]Teacher of text[/bold]: nobody is asked", highlight=False)
        return
    left = sum(part.requests - part.answered for part in preview.splits)
    read = sum(part.tokens_in for part in preview.splits)
    most = sum(part.most_tokens_out for part in preview.splits)
    cost = "no prices in the recipe"
    if preview.most_cost is not None:
        cost = f"{preview.most_cost:,.2f} {preview.currency} at most"
    about = "" if preview.exact else "about "
    console.print(
        f"[bold]Teacher of text[/bold]: {left:,} requests, {about}{short_count(read)} tokens in, at most "
        f"{short_count(most)} out; {plain(cost)}",
        highlight=False,
        soft_wrap=True,
    )


def _show_time(plan: Plan, console: Console) -> None:
    total = sum(plan.seconds.values())
    console.print(
        f"[bold]Time[/bold]: about {in_words(total)}, with texts as long as they may be ({plain(plan.machine.why)})",
        highlight=False,
        soft_wrap=True,
    )
    for name, seconds in plan.seconds.items():
        console.print(f"  {in_words(seconds):>9}  {plain(name)}", highlight=False)
    if plan.preview is not None and not plan.memories.writing:
        console.print("  what a teacher takes that answers elsewhere is not known", highlight=False)


def in_words(seconds: float) -> str:
    if seconds < _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / _HOUR:.1f} h"


def _short(name: str) -> str:
    return name.replace(" ", "\n", 1).replace(" rationales", "\nrationales").replace(" validation", "\nvalidation")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table
