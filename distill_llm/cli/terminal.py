"""What all commands share of the terminal: arguments, the console, progress bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from distill_llm.core.processes import is_main_process

if TYPE_CHECKING:
    from distill_llm.cli.progress import TerminalProgress

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file, or one that came with the package")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, such as train.max_steps=100")
]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="a run folder, such as runs/cqa-t5-base")]
_wanted = {"quiet": False}


def be_quiet(quiet: bool) -> None:
    """Whether commands show results and errors alone."""
    _wanted["quiet"] = quiet


def console() -> Console:
    return Console(quiet=not is_main_process())


def progress_bars() -> TerminalProgress:
    from distill_llm.cli.progress import TerminalProgress

    return TerminalProgress(Console(quiet=_wanted["quiet"] or not is_main_process()))


def show_next(command: str) -> None:
    """On one line however narrow the terminal is, so that it can be copied."""
    console().print(f"Next: [bold]{escape(command)}[/bold]", highlight=False, soft_wrap=True)


def plain(message: str) -> str:
    """The message as it is, not as markup."""
    return escape(message)
