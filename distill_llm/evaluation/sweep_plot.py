"""One picture of a sweep: validation accuracy against the values of each key that varied."""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path
from typing import Any

from distill_llm.core.extras import load_extra
from distill_llm.core.files import atomic
from distill_llm.evaluation.sweep_report import SweepReport, Tried

_WIDTH, _HEIGHT, _A_ROW = 4.4, 3.9, 3  # inches of a panel, and how many stand side by side
_LINE, _FAINT, _CHOSEN = "#1f5fa8", "#b3b3b3", "#c8371b"
_IS_CHOSEN, _IS_OTHER, _IS_ONE_SEED = "chosen", "all other settings", "each seed"
_LETTERS = 42  # that fit below a panel, side by side


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
    found = [panel.get_legend_handles_labels() for panel in panels[:count]]
    entries = {label: handle for handles, labels in found[::-1] for handle, label in zip(handles, labels, strict=True)}
    order = [label for label in (_legend(report), _IS_CHOSEN, _IS_ONE_SEED, _IS_OTHER) if label in entries]
    figure.legend(
        [entries[label] for label in order], order, loc="outside lower center", ncols=4, fontsize=9, frameon=False
    )
    _title(figure, report)
    return figure


def _draw(panel: Any, report: SweepReport, number: int) -> None:
    """Values of numbers in their order, others as typed; all at the same distance."""
    axis, best = report.axes[number], report.best
    numbers = [value for value in axis.values if isinstance(value, int | float)]
    numeric = len(numbers) == len(axis.values)
    order = sorted(range(len(numbers)), key=lambda place: numbers[place]) if numeric else range(len(axis.values))
    at = {place: position for position, place in enumerate(order)}
    on_line = sorted(
        (one for one in report.tried if _others(one, number) == _others(best, number)),
        key=lambda one: at[one.places[number]],
    )
    off_line = [one for one in report.tried if one not in on_line]
    if off_line:
        places, means = [at[one.places[number]] for one in off_line], [100 * one.mean for one in off_line]
        panel.scatter(places, means, color=_FAINT, s=22, label=_IS_OTHER, zorder=2)
    if len(report.seeds) > 1:
        _draw_seeds(panel, [at[one.places[number]] for one in on_line], on_line, "-" if numeric else ":")
    panel.scatter(
        [at[best.places[number]]], [100 * best.mean], color=_CHOSEN, marker="*", s=190, label=_IS_CHOSEN, zorder=4
    )
    panel.errorbar(
        [at[one.places[number]] for one in on_line],
        [100 * one.mean for one in on_line],
        [100 * (one.deviation or 0.0) for one in on_line] if best.deviation is not None else None,
        color=_LINE,
        marker="o",
        linestyle="-" if numeric else "none",
        capsize=4,
        label=_legend(report),
        zorder=3,
    )
    letters = max(6, _LETTERS // len(at))
    panel.set_xticks(range(len(at)), ["\n".join(textwrap.wrap(axis.shown[place], letters)) for place in order])
    panel.set_xlim(-0.5, len(at) - 0.5)
    panel.set_xlabel("\n".join(axis.keys), fontsize=9)
    panel.grid(axis="y", color="#e4e4e4")
    panel.spines[["top", "right"]].set_visible(False)


def _draw_seeds(panel: Any, positions: list[int], tried: list[Tried], style: str) -> None:
    """What belongs together: seeds often differ by more than settings do, and all settings have the same seeds."""
    for number in range(len(tried[0].validation)):
        values = [100 * one.validation[number] for one in tried]
        label = _IS_ONE_SEED if number == 0 else None
        panel.plot(
            positions, values, color=_LINE, alpha=0.35, marker=".", linestyle=style, lw=1, label=label, zorder=2.5
        )


def _legend(report: SweepReport) -> str:
    rest = "the rest as chosen, " if len(report.axes) > 1 else ""
    return rest + ("mean ± sd over seeds" if len(report.seeds) > 1 else "one seed")


def _others(tried: Tried, axis: int) -> tuple[int, ...]:
    return (*tried.places[:axis], *tried.places[axis + 1 :])


def _title(figure: Any, report: SweepReport) -> None:
    count = len(report.seeds)
    seeds = f"{count} seeds" if count > 1 else "one seed"
    title = (
        f"{report.recipe}: {len(report.tried)} settings, {seeds}, {report.validation_examples:,} validation examples"
    )
    letters = _LETTERS * min(len(report.axes), _A_ROW)
    figure.suptitle("\n".join(textwrap.wrap(title, letters)), fontsize=11)
