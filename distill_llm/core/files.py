"""Files that are whole or absent: atomic writes, fingerprints."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill_llm.core.errors import StorageError

_TORCH_CANNOT_WRITE = re.compile(r"PytorchStreamWriter failed writing|unexpected pos \d+ vs|iostream error")


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turns an operating system's refusal to write into a StorageError that says what to do."""
    try:
        yield
    except Exception as error:
        number = _refusal(error)
        if number is None or isinstance(error, StorageError):
            raise
        hint = {
            errno.ENOSPC: "The disk is full: free some space or choose another run_dir, then type the same command.",
            errno.EDQUOT: "The disk quota is used up: free some space or choose another run_dir.",
            errno.EACCES: "Choose a run_dir that you may write to.",
            errno.EROFS: "The file system is read-only: choose another run_dir.",
            errno.ENOTDIR: "A file lies where a folder is needed: choose another run_dir.",
            errno.EEXIST: "A file lies where a folder is needed: choose another run_dir.",
        }.get(number, "Check the path and type the same command again: finished work is kept.")
        raise StorageError(f"{path}: cannot write ({getattr(error, 'strerror', None) or error}). {hint}") from error


def _refusal(error: Exception) -> int | None:
    """The operating system's error number (0 where it gave none); None where writing was not what failed.

    Libraries that write weights raise errors of their own: safetensors with the number in its text, torch without.
    """
    if isinstance(error, OSError):
        return error.errno or 0
    numbered = re.search(r"\(os error (\d+)\)", str(error))
    if numbered:
        return int(numbered[1])
    return errno.ENOSPC if _TORCH_CANNOT_WRITE.search(str(error)) else None


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` when the block ends without an error, and vanishes otherwise.

    Of a link, what it points to is replaced: runs that share a file go on sharing it.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with storage(path):
            yield draft
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path}: cannot be read ({error}). Delete it and run the recipe again to make it anew."
        ) from None


_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that change when ``value`` (anything JSON can hold) does."""
    text = _CANONICAL.encode(value)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """16 hexadecimal digits of a file's content, all of it: weights may differ in the middle alone."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
