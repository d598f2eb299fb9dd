"""A refusal to write, whoever words it, becomes one error that says what to do; other errors stay what they are."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from distill_llm.core.errors import StorageError
from distill_llm.core.files import storage

FULL = "The disk is full"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), FULL),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "read-only"),
        (OSError("who knows"), "finished work is kept"),
        # as safetensors 0.7 and torch 2.13 word it on a full disk
        (ValueError("Error while serializing: I/O error: No space left on device (os error 28)"), FULL),
        (ValueError("Error while serializing: I/O error: Permission denied (os error 13)"), "may write to"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 421632 vs 421520"), FULL),
        (RuntimeError("basic_ios::clear: iostream error"), FULL),
    ],
    ids=str,
)
def test_refusal_to_write(error: Exception, said: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=said) as caught, storage(tmp_path / "file"):
        raise error
    assert str(caught.value).startswith(f"{tmp_path / 'file'}: cannot write (")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [ValueError("a bad value"), RuntimeError("out of memory"), StorageError("said before")]
)
def test_other_errors_pass(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, storage(tmp_path):
        raise error
    assert caught.value is error
