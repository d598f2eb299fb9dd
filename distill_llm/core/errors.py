"""Every error that a user can cause or meet is a DistillError, with the exit code of the command line."""

from __future__ import annotations

from typing import ClassVar


class DistillError(Exception):
    """Base class: ``except DistillError`` catches all that the toolkit raises on purpose."""

    exit_code: ClassVar[int] = 1


class ConfigError(DistillError, ValueError):
    """A recipe or a command is wrong. The message says where, what came, what was expected, what to do."""

    exit_code: ClassVar[int] = 2


class DataError(DistillError, ValueError):
    """The data of a task is missing or wrong."""

    exit_code: ClassVar[int] = 2


class StorageError(DistillError, OSError):
    """A file of a run could not be written or read back."""

    exit_code: ClassVar[int] = 2


class TeacherError(DistillError, RuntimeError):
    """A teacher cannot give what was asked of it."""


class ExportError(DistillError, RuntimeError):
    """A model cannot be written in a format, or the format's runtime does not read what was written."""


class BudgetReached(DistillError):
    """The budget is used up before all was asked; what came back is kept."""

    exit_code: ClassVar[int] = 3


class Interrupted(DistillError):
    """The user stopped the work; what was finished is on disk."""

    exit_code: ClassVar[int] = 130
