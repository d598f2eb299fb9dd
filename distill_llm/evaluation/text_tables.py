"""Numbers short enough for a table, and tables for a terminal and for Markdown. An unknown number is "-"."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.table import Table

UNKNOWN = "-"


def short_count(number: float | None) -> str:
    """Two or three digits and a suffix: ``118k``, ``1.2M``, ``220M``."""
    return UNKNOWN if number is None else _scaled(number, ("", "k", "M", "B", "T"))


def short_bytes(number: float | None) -> str:
    """Decimal units, as disks are sold: ``471 kB``, ``1.2 GB``."""
    return UNKNOWN if number is None else _scaled(number, (" B", " kB", " MB", " GB", " TB"))


def short_number(number: float | None) -> str:
    """About three digits, and no suffix: ``0.42``, ``31.7``, ``12,345``."""
    if number is None:
        return UNKNOWN
    digits = next((digits for digits, bound in ((2, 9.995), (1, 99.95)) if abs(number) < bound), 0)
    return f"{number:,.{digits}f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def percent_interval(share: float, low: float, high: float) -> str:
    return f"{percent(share)} [{percent(low)}, {percent(high)}]"


def percent_spread(share: float, deviation: float | None) -> str:
    """A mean with the standard deviation around it; without one, where there was but one value."""
    return percent(share) if deviation is None else f"{percent(share)} ± {percent(deviation)}"


def points_spread(difference: float, deviation: float | None) -> str:
    """A mean difference in percentage points, with its sign, and its standard deviation where there is one."""
    return f"{100 * difference:+.1f}" if deviation is None else f"{100 * difference:+.1f} ± {percent(deviation)}"


def points_interval(difference: float, low: float, high: float) -> str:
    """A difference in percentage points, always with its sign."""
    return f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def p_value(chance: float) -> str:
    return "<0.001" if chance < 0.001 else f"{chance:.3f}"


def terminal_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int, bold: str = "") -> Table:
    """A table whose first column wraps and whose others never do; right-aligned from column ``numbers_from`` on.

    The row that starts with the text ``bold`` is printed bold.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        justify = "right" if index >= numbers_from else "left"
        table.add_column(Text(name), justify=justify, no_wrap=index > 0, overflow="fold", vertical="top")
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if row[0] == bold else "")
    return table


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int, bold: str = "") -> str:
    """The same table as Markdown; the first cell of the row that starts with the text ``bold`` is bold."""
    rules = ["---:" if index >= numbers_from else "---" for index in range(len(header))]
    body = [[f"**{cell}**" if index == 0 and cell == bold else cell for index, cell in enumerate(row)] for row in rows]
    return "\n".join(f"| {' | '.join(map(_markdown_cell, row))} |" for row in (header, rules, *body))


def _markdown_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _scaled(number: float, units: Sequence[str]) -> str:
    """The number in the largest unit that keeps it at 1 or more after rounding."""
    value, unit = float(number), 0
    while value >= 999.5 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    digits = 1 if unit and value < 9.95 else 0
    return f"{value:.{digits}f}{units[unit]}"
