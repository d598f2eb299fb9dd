"""How the command line shows a recipe's examination."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from distill_llm.pipeline.diagnosis import Diagnosis

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def show_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in diagnosis.findings:
        table.add_row(f"[{_COLOURS[finding.level]}]{finding.level}[/]", finding.what, _plain(finding.said))
    console.print(table)
    if diagnosis.rows:
        console.print("\nRows of one micro-batch; the student reads what is left, and learns each token between bars:")
        for row in diagnosis.rows:
            console.print(f"  {row}", markup=False, highlight=False, soft_wrap=True)
    if diagnosis.terms:
        console.print("\nEach term at step 0, on that micro-batch:")
        terms = Table("term", "loss", "gradient norm", "tokens", box=None, pad_edge=False)
        for facts in diagnosis.terms:
            terms.add_row(facts.name, f"{facts.loss:.4f}", f"{facts.gradient_norm:.4g}", f"{facts.tokens:,}")
        console.print(terms)
    verdict = "may run" if diagnosis.may_run else "may not run"
    console.print(f"\n[bold]The recipe {verdict}.[/bold]", highlight=False)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
