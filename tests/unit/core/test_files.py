"""Files are whole or absent, journals survive a kill, and a full disk is a StorageError that says what to do."""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from distill_llm.core.errors import ConfigError, DistillError, StorageError
from distill_llm.core.files import (
    Journal,
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


def test_a_full_disk_while_journaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was appended before is there, and the entry that failed is not counted as done."""
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"key": "a", "text": "kept"})

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", full)
        with pytest.raises(StorageError, match=r"disk is full.*type the same command"):
            journal.append({"key": "b", "text": "lost"})
    assert set(journal.entries) == {"a"}
    assert set(Journal(journal.path).entries) == {"a"}


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    for write in (lambda path: write_text(path, "x"), Journal):
        with pytest.raises(StorageError, match="A file lies where a folder is needed"):
            write(tmp_path / "runs" / "journal.jsonl")


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


def test_a_journal_gives_back_what_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "rationales" / "journal.jsonl"
    entries = [{"key": "a", "text": "one\ntwo \u2028 three"}, {"key": "b", "text": "é"}]
    journal = Journal(path)
    for entry in entries:
        journal.append(entry)
    assert Journal(path).entries == {"a": entries[0], "b": entries[1]} == journal.entries
    assert len(path.read_text(encoding="utf-8").split("\n")) == 3


@pytest.mark.parametrize("torn", ['{"key": "c", "te', '{"key": "c", "text": "whole but without its line end"}', "\xc3"])
def test_a_torn_last_line_is_cut_off_and_written_over(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "journal.jsonl"
    for key in "ab":
        Journal(path).append({"key": key})
    with path.open("ab") as file:
        file.write(torn.encode("latin-1"))
    journal = Journal(path)
    assert set(journal.entries) == {"a", "b"}
    journal.append({"key": "d"})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "d"]


@pytest.mark.parametrize("damage", ['{"key": "b"', '{"no": "key"}', '["key"]', "", "7"])
def test_a_torn_line_elsewhere_is_an_error_with_its_number(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(f'{{"key": "a"}}\n{damage}\n{{"key": "c"}}\n')
    with pytest.raises(StorageError, match=r"journal\.jsonl:2: not a line of a journal.*delete that line"):
        Journal(path)
    assert path.read_text().count("\n") == 3, "nothing was repaired silently"
