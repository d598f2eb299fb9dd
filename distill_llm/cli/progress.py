"""Progress on the terminal: bars where it is one, sparse lines where it is a file or a log."""

from __future__ import annotations

import datetime
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

_SECONDS_A_LINE = 10.0
_WIDE = 100


class _SpeedColumn(ProgressColumn):
    """How many a second: of late while it runs, on the whole when it is done."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_rate(speed)}/s" if speed else "")


class TerminalProgress:
    """Use as a context manager; bars stay on the screen when they are full."""

    def __init__(self, console: Console):
        self._console = console
        whole = Column(no_wrap=True)  # so that it is the bar that gives way where a line is narrow
        elapsed = [TimeElapsedColumn(table_column=whole)] if console.width >= _WIDE else []
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(table_column=whole),
            _SpeedColumn(table_column=whole),
            *elapsed,
            TimeRemainingColumn(table_column=whole),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, float] = {}
        self._begun: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def advance(self, name: str, done: float, total: float, note: str = "") -> None:
        if not self._console.is_terminal:
            self._print_now_and_then(name, done, total, note)
            return
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, note=note)
        self._bars.update(self._tasks[name], completed=done, total=total, note=note)

    def say(self, message: str) -> None:
        self._bars.console.print(message, markup=False, highlight=False, soft_wrap=True)  # a log has no width

    def _print_now_and_then(self, name: str, done: float, total: float, note: str) -> None:
        """A line every ten seconds, and one at the end."""
        finished, now = done >= total, time.monotonic()
        if finished and self._printed.get(name) == float("inf"):
            return
        began, before = self._begun.setdefault(name, (now, done))
        if finished or now - self._printed.get(name, -float("inf")) > _SECONDS_A_LINE:
            self._printed[name] = float("inf") if finished else now
            pace = _pace(done - before, now - began, total - done)
            self.say(f"{name}: {done:,.0f} of {total:,.0f}{f' ({note})' if note else ''}{pace}")


def _pace(done: float, seconds: float, left: float) -> str:
    """The rate since the first line, and how long the rest takes at it; nothing where too little is known."""
    if done <= 0 or seconds < 1:
        return ""
    rest = f", {datetime.timedelta(seconds=round(left * seconds / done))} left" if left > 0 else ""
    return f", {_rate(done / seconds)}/s{rest}"


def _rate(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
