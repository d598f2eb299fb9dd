"""Files are whole or absent, and a full disk is a StorageError that says what to do."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from distill_llm.core.errors import ConfigError, DistillError, StorageError
from distill_llm.core.files import (
    atomic,
    file_fingerprint,
    fingerprint,
    read_json,
    storage,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from pathlib import Path


def _write_half(path: Path, error: Exception) -> None:
    with atomic(path) as draft:
        draft.write_text("half of the n")
        raise error


def test_a_whole_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    write_text(path, "one")
    write_text(path, "two é")
    assert path.read_text(encoding="utf-8") == "two é"
    assert [other.name for other in path.parent.iterdir()] == ["file.txt"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError):
        _write_half(path, ZeroDivisionError())
    assert path.read_text() == "old"
    assert [other.name for other in tmp_path.iterdir()] == ["file.txt"]


def test_what_a_link_points_to_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    shared, link = tmp_path / "shared" / "file.txt", tmp_path / "own" / "file.txt"
    write_text(shared, "old")
    link.parent.mkdir()
    link.symlink_to("../shared/file.txt")
    write_text(link, "new")
    assert shared.read_text() == link.read_text() == "new"
    assert link.is_symlink()
    assert [[other.name for other in path.parent.iterdir()] for path in (shared, link)] == [["file.txt"]] * 2


def test_a_reader_never_sees_a_draft(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with atomic(path) as draft:
        draft.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_storage_error_with_exit_code_2(tmp_path: Path, number: int) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(StorageError, match="free some space") as caught:
        _write_half(path, OSError(number, os.strerror(number)))
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert [other.name for other in tmp_path.iterdir()] == ["file.txt"]


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StorageError, match="A file lies where a folder is needed"):
        write_text(tmp_path / "runs" / "file.txt", "x")


def test_a_storage_error_is_not_wrapped_again() -> None:
    from pathlib import Path

    inner = StorageError("as it was")
    with pytest.raises(StorageError) as caught, storage(Path("x")):
        raise inner
    assert caught.value is inner
    assert isinstance(inner, OSError)
    assert isinstance(inner, DistillError)
    assert isinstance(ConfigError("x"), ValueError)


def test_json_comes_back_and_a_broken_file_says_what_to_do(tmp_path: Path) -> None:
    value = {"name": "é", "list": [1, 2.5, None, True]}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    (tmp_path / "value.json").write_text('{"name": ')
    with pytest.raises(StorageError, match="Delete it"):
        read_json(tmp_path / "value.json")
    with pytest.raises(StorageError, match=r"gone\.json"):
        read_json(tmp_path / "gone.json")


def test_fingerprints() -> None:
    """They follow the value, not the order of its keys, and stay the same from version to version."""
    assert fingerprint({"a": 1, "b": "é"}) == fingerprint({"b": "é", "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint(["a", "b"]) != fingerprint(["ab"])
    assert fingerprint([1, "a"]) == "2010945388e2de98"  # printf '[1,"a"]' | sha256sum


def test_file_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"abc")
    assert file_fingerprint(tmp_path / "a") == file_fingerprint(tmp_path / "b")
    for other in (b"abd", b"abcc", b"ab"):
        (tmp_path / "b").write_bytes(other)
        assert file_fingerprint(tmp_path / "a") != file_fingerprint(tmp_path / "b")
