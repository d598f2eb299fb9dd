"""How long work reports what it does; the command line draws it, the library is silent unless asked."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Named bars that advance, and lines of text above them."""

    def advance(self, name: str, done: float, total: float, note: str = "") -> None:
        """Bar ``name`` stands at ``done`` of ``total``; it is drawn when first named."""

    def say(self, message: str) -> None:
        """One line for the reader."""


class Silent:
    """Reports nothing."""

    def advance(self, name: str, done: float, total: float, note: str = "") -> None:
        pass

    def say(self, message: str) -> None:
        pass


SILENT = Silent()
