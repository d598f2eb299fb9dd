"""One picture of a sweep: validation accuracy against the values of each key that varied."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from distill_llm.core.extras import load_extra
from distill_llm.core.files import atomic
from distill_llm.evaluation.sweep_report import SweepReport, Tried

_WIDTH, _HEIGHT, _A_ROW = 4.6, 3.9, 3  # inches of a panel, and how many stand side by side
_LINE, _FAINT, _CHOSEN = "#1f5fa8", "#b3b3b3", "#c8371b"
_MANY_LETTERS = 40


def save_plot(path: Path, report: SweepReport) -> None:
    """Writes the picture as PNG. Raises ConfigError where matplotlib is not installed."""
    figure = make_figure(report)
    with atomic(path) as draft:
        figure.savefig(draft, format="png", dpi=150)


def make_figure(report: SweepReport) -> Any:
    """A panel a key: a line through the settings that are as the chosen one in all else, faint points for others."""
    load_extra("matplotlib", "plot", where="the plot of a sweep")
    figure_class: Any = importlib.import_module("matplotlib.figure").Figure
    count = len(report.axes)
    columns = min(count, _A_ROW)
    rows = -(-count // columns)
    figure = figure_class(figsize=(_WIDTH * columns + 0.4, _HEIGHT * rows + 0.7), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for number, panel in enumerate(panels[:count]):
        _draw(panel, report, number)
        if number % columns == 0:
            panel.set_ylabel("validation accuracy, %")
    for panel in panels[count:]:
        panel.remove()
    _title(figure, report)
    return figure


def _draw(panel: Any, report: SweepReport, axis: int) -> None:
    best = report.best
    on_line = [one for one in report.tried if _others(one, axis) == _others(best, axis)]
    off_line = [one for one in report.tried if one not in on_line]
    on_line.sort(key=lambda one: one.places[axis])
    if off_line:
        places = [one.places[axis] for one in off_line]
        means = [100 * one.mean for one in off_line]
        panel.scatter(places, means, color=_FAINT, s=22, label="other settings", zorder=2)
    places, means = [one.places[axis] for one in on_line], [100 * one.mean for one in on_line]
    deviations = [100 * (one.deviation or 0.0) for one in on_line]
    has_bars = best.deviation is not None
    label = "the rest as chosen" if len(report.axes) > 1 else "mean"
    label += " (bars: ± 1 sd over seeds)" if has_bars else ""
    panel.errorbar(
        places, means, deviations if has_bars else None, color=_LINE, marker="o", capsize=4, label=label, zorder=3
    )
    panel.scatter([best.places[axis]], [100 * best.mean], color=_CHOSEN, marker="*", s=210, label="chosen", zorder=4)
    shown = report.axes[axis].shown
    crowded = sum(map(len, shown)) > _MANY_LETTERS
    panel.set_xticks(range(len(shown)), shown, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    panel.set_xlim(-0.5, len(shown) - 0.5)
    panel.set_xlabel("\n".join(report.axes[axis].keys), fontsize=9)
    panel.grid(axis="y", color="#e4e4e4")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=7, frameon=False)


def _others(tried: Tried, axis: int) -> tuple[int, ...]:
    return (*tried.places[:axis], *tried.places[axis + 1 :])


def _title(figure: Any, report: SweepReport) -> None:
    count = len(report.seeds)
    seeds = f"{count} seeds" if count > 1 else "one seed"
    figure.suptitle(
        f"{report.recipe}: {len(report.tried)} settings, {seeds}, {report.validation_examples:,} validation examples",
        fontsize=11,
    )
