"""How the command line shows caches of signals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from distill_llm.pipeline.cache_stage import CacheReport


def show_caches(reports: Sequence[CacheReport], console: Console) -> None:
    """One line a cache, with what a token of it takes on disk, row keys included."""
    columns = ("teacher", "rows", "there before", "tokens", "bytes/token", "captured mass", "matched tokens", "seconds")
    table = Table(*columns, box=None, pad_edge=False)
    for report in reports:
        table.add_row(
            report.name,
            f"{report.rows:,}",
            f"{report.there:,}",
            f"{report.tokens:,}",
            f"{report.num_bytes / max(report.tokens, 1):,.1f}",
            "-" if report.captured_mass is None else f"{report.captured_mass:.2%}",
            "-" if report.known is None else f"{report.known:.1%}",
            f"{report.seconds:.1f}",
        )
    console.print(table)
    for report in reports:
        console.print(f"{report.name}: {report.folder}", markup=False, highlight=False, soft_wrap=True)
