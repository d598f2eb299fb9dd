"""Journals survive a kill and a full disk, have one writer, and remember places instead of texts."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from distill_llm.core.errors import StorageError
from distill_llm.core.journal import Journal, keys_of


def _keys(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text(encoding="utf-8").splitlines()]


def _append(path: Path, *entries: dict[str, Any]) -> None:
    with Journal(path) as journal:
        for entry in entries:
            journal.append(entry)


def _python(code: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_journal_gives_back_what_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "rationales" / "journal.jsonl"
    entries = [{"key": "a", "text": "one\ntwo \u2028 three"}, {"key": "b", "text": "é", "scores": [1.5, [2]]}]
    with Journal(path) as journal:
        for entry in entries:
            journal.append(entry)
        assert [journal.read(entry["key"]) for entry in entries] == entries
    with Journal(path) as journal:
        assert [journal.read(entry["key"]) for entry in entries] == entries
        assert ("a" in journal, "b" in journal, "c" in journal, len(journal)) == (True, True, False, 2)
        with pytest.raises(KeyError):
            journal.read("c")
    assert path.read_bytes().count(b"\n") == 2


def test_the_latest_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for text in ("first", "second"):
            journal.append({"key": "0a", "text": text})
        assert (journal.read("0a")["text"], len(journal)) == ("second", 1)
    with Journal(path) as journal:
        assert (journal.read("0a")["text"], len(journal)) == ("second", 1)
    assert _keys(path) == ["0a", "0a"], "nothing is taken out"


@pytest.mark.parametrize("size", [4095, 4096, 5000, 40_000, 300_000])
def test_long_entries_come_back_whole(tmp_path: Path, size: int) -> None:
    """They are read a few thousand bytes at a time; two-byte characters fall on every border."""
    entries = [{"key": f"{i:x}", "text": "é" * (size // 2 - i)} for i in range(3)]
    _append(tmp_path / "journal.jsonl", *entries)
    with Journal(tmp_path / "journal.jsonl") as journal:
        for entry in reversed(entries):
            assert journal.read(entry["key"]) == entry


def test_half_a_surrogate_pair_does_not_stop_a_run(tmp_path: Path) -> None:
    """A server may cut an emoji in two; such a text has no UTF-8."""
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.append({"key": "a", "text": "so far \ud83d"})
        assert journal.read("a")["text"] == "so far ?"


TORN = ['{"key": "c", "te', '{"key": "c", "text": "whole but without its line end"}', "\xc3", "x" * 10_000]


@pytest.mark.parametrize("torn", TORN, ids=["half", "no line end", "half a character", "long"])
def test_a_torn_last_line_is_cut_off_and_written_over(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "journal.jsonl"
    _append(path, {"key": "a"}, {"key": "b"})
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode("latin-1"))
    with Journal(path) as journal:
        assert path.read_bytes() == whole
        assert ("c" in journal, len(journal)) == (False, 2)
        journal.append({"key": "d"})
    assert _keys(path) == ["a", "b", "d"]


def test_a_journal_of_a_torn_line_alone_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"key": "a", "text')
    with Journal(path) as journal:
        assert len(journal) == 0
    assert path.read_bytes() == b""


@pytest.mark.parametrize("damage", ['{"key": "b"', '{"no": "key"}', '["key"]', "", "7", '{"key": "no number"}'])
def test_a_torn_line_elsewhere_is_an_error_with_its_number(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(f'{{"key": "a"}}\n{damage}\n{{"key": "c"}}\n')
    with pytest.raises(StorageError, match=r"journal\.jsonl:2: not a line of a journal.*delete that line"):
        Journal(path)
    assert path.read_text().count("\n") == 3, "nothing was repaired silently"
    path.write_text('{"key": "a"}\n{"key": "c"}\n')
    with Journal(path) as mended:  # the refusal gave its lock back
        assert len(mended) == 2


def test_others_are_read_and_never_written(tmp_path: Path) -> None:
    own, other, gone = (tmp_path / f"journal.{i}.jsonl" for i in range(3))
    _append(other, {"key": "b", "text": "theirs"}, {"key": "c", "text": "long " * 2000})
    with other.open("ab") as file:
        file.write(b'{"key": "d", "te')  # its process is writing right now, or was killed
    before = other.read_bytes()
    with Journal(other), Journal(own, others=[other, gone]) as journal:  # the other's lock does not matter
        assert (journal.read("b")["text"], len(journal)) == ("theirs", 2)
        assert len(journal.read("c")["text"]) == 10_000
        journal.append({"key": "a", "text": "mine"})
        assert journal.read("a")["text"] == "mine"
        assert journal.read("b")["text"] == "theirs"
    assert _keys(own) == ["a"]
    assert before.startswith(other.read_bytes()), "only its own process cuts its torn line"
    assert not gone.exists()


def test_a_torn_line_in_another_s_journal_is_left_there(tmp_path: Path) -> None:
    own, other = tmp_path / "journal.jsonl", tmp_path / "journal.1.jsonl"
    other.write_bytes(b'{"key": "b"}\n{"key": "d", "te')
    with Journal(own, others=[other]) as journal:
        assert ("b" in journal, "d" in journal) == (True, False)
    assert other.read_bytes() == b'{"key": "b"}\n{"key": "d", "te'


def test_a_damaged_line_of_another_s_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "journal.1.jsonl").write_text("?\n")
    with pytest.raises(StorageError, match=r"journal\.1\.jsonl:1: not a line"):
        Journal(tmp_path / "journal.jsonl", others=[tmp_path / "journal.1.jsonl"])


def test_each_entry_is_told_with_whose_it_is(tmp_path: Path) -> None:
    own, other = tmp_path / "journal.jsonl", tmp_path / "journal.1.jsonl"
    _append(own, {"key": "a"}, {"key": "a", "n": 2})
    _append(other, {"key": "b"})
    told: list[Any] = []
    with Journal(own, others=[other], each=lambda entry, is_own: told.append((dict(entry), is_own))):
        pass
    assert told == [({"key": "a"}, True), ({"key": "a", "n": 2}, True), ({"key": "b"}, False)]


def test_keys_are_read_without_a_lock_and_without_writing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"key": "0f"})
        with path.open("ab") as file:
            file.write(b'{"key": "10"')
        before = path.read_bytes()
        assert keys_of([path, tmp_path / "gone.jsonl"]) == {15}
        assert path.read_bytes() == before


SECOND_WRITER = """
import sys
from pathlib import Path
from distill_llm.core.errors import StorageError
from distill_llm.core.journal import Journal
try:
    Journal(Path(sys.argv[1]))
except StorageError as error:
    sys.exit(str(error))
"""


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"key": "a"})
        with path.open("ab") as file:
            file.write(b'{"key": "b"')  # the first writer is in the middle of a line
        refused = _python(SECOND_WRITER, path)
        assert refused.returncode == 1
        assert "journal.jsonl: another process is writing to it. Wait until that command has ended" in refused.stderr
        assert path.read_bytes() == b'{"key": "a"}\n{"key": "b"', "the second one cut nothing"
    assert _python(SECOND_WRITER, path).returncode == 0


KILLED_HOLDER = """
import os, signal, sys
from pathlib import Path
from distill_llm.core.journal import Journal
journal = Journal(Path(sys.argv[1]))
journal.append({"key": "a"})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_its_entries_and_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert _python(KILLED_HOLDER, path).returncode == -9
    with Journal(path) as journal:
        assert "a" in journal


FULL_DISK = """
import resource, sys
from pathlib import Path
from distill_llm.core.errors import StorageError
from distill_llm.core.journal import Journal

path, limit = Path(sys.argv[1]), 1000
journal = Journal(path)
journal.append({"key": "a", "text": "x" * 600})
before = path.read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    journal.append({"key": "b", "text": "y" * 600})  # 400 bytes fit: the system writes those, and then refuses
except StorageError as error:
    print(error)
assert path.read_bytes() == before, "half an entry was left"
assert "b" not in journal
assert journal.read("a")["text"] == "x" * 600
journal.append({"key": "c", "text": "fits"})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.append({"key": "b", "text": "y" * 600})  # there is room again
assert journal.read("b")["text"] == "y" * 600
"""


def test_a_file_that_cannot_grow_takes_no_half_entry(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    done = _python(FULL_DISK, path)
    assert done.returncode == 0, done.stderr
    assert f"{path}: cannot write (File too large). " in done.stdout
    assert _keys(path) == ["a", "c", "b"]
    with Journal(path) as journal:
        assert len(journal) == 3


def test_a_full_disk_while_journaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was appended before is there, and the entry that failed is not counted as done."""
    import errno
    import os

    path, write = tmp_path / "journal.jsonl", os.write

    def full_after_five_bytes(descriptor: int, line: bytes) -> int:
        if len(line) < 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, line[: len(line) - 10])

    with Journal(path) as journal:
        journal.append({"key": "a", "text": "kept"})
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full_after_five_bytes)
            with pytest.raises(StorageError, match=r"disk is full.*type the same command"):
                journal.append({"key": "b", "text": "lost"})
        assert path.read_bytes() == before
        assert ("a" in journal, "b" in journal) == (True, False)


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StorageError, match="A file lies where a folder is needed"):
        Journal(tmp_path / "runs" / "journal.jsonl")


def test_memory_holds_places_and_not_texts(tmp_path: Path) -> None:
    path, number, length = tmp_path / "journal.jsonl", 2000, 4000
    with path.open("w") as file:
        for i in range(number):
            file.write(json.dumps({"key": f"{i:016x}", "text": "x" * length}) + "\n")
    tracemalloc.start()
    with Journal(path) as journal:
        assert len(journal) == number
        held, _ = tracemalloc.get_traced_memory()
        assert journal.read(f"{number - 1:016x}")["text"] == "x" * length
    tracemalloc.stop()
    assert held < 0.05 * number * length
