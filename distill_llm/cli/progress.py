"""Progress on the terminal: bars where it is one, sparse lines where it is a file or a log."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class TerminalProgress:
    """Use as a context manager; bars stay on the screen when they are full."""

    def __init__(self, console: Console):
        self._console = console
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, float] = {}

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
        self._bars.console.print(message, markup=False, highlight=False)

    def _print_now_and_then(self, name: str, done: float, total: float, note: str) -> None:
        """A line every ten seconds, and one at the end."""
        finished, now = done >= total, time.monotonic()
        if finished and self._printed.get(name) == float("inf"):
            return
        if finished or now - self._printed.get(name, now - 11) > 10:
            self._printed[name] = float("inf") if finished else now
            self.say(f"{name}: {done:,.0f} of {total:,.0f}{f' ({note})' if note else ''}")
