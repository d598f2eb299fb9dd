"""Append-only journals: what was appended survives a kill, and is found again by its key."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from distill_llm.core.errors import StorageError
from distill_llm.core.files import storage

Entry: TypeAlias = Mapping[str, Any]
_GUESS = 4096  # bytes of a line, at a first try
_FILES = 16  # bits of a place that say which file
_SYNC_SECONDS = 1.0


class Journal:
    """JSON lines, each with a ``key``; the latest of a key counts. Memory holds keys and places, not the entries.

    One process appends to ``path``; ``others`` are the journals of processes beside it, read as they were when this one
    was opened. A last line that was torn by a kill is cut off, a torn line anywhere else is a StorageError.
    ``each`` is called with every entry that is found, and whether it is in ``path``.
    """

    def __init__(self, path: Path, *, others: Sequence[Path] = (), each: Callable[[Entry, bool], None] | None = None):
        self.path = path
        self._paths = [path, *others]
        self._readers: dict[int, int] = {}
        self._places: dict[int, int] = {}
        self._synced = time.monotonic()
        with storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            with storage(path):
                _lock(self._writer, path)
                _cut_torn_tail(self._writer)
            self._find(each)
        except BaseException:
            self.close()  # gives the lock back: the journal may be mended and opened again
            raise

    def _find(self, each: Callable[[Entry, bool], None] | None) -> None:
        for number, path in enumerate(self._paths):
            for offset, entry in _entries(path):
                self._places[int(entry["key"], 16)] = offset << _FILES | number
                if each is not None:
                    each(entry, number == 0)

    def __contains__(self, key: str) -> bool:
        return int(key, 16) in self._places

    def __len__(self) -> int:
        return len(self._places)

    def append(self, entry: Entry) -> None:
        """Writes one entry through to the operating system before it returns, all of it or nothing.

        Half a surrogate pair, which a server may cut a text down to, is written as a question mark.
        """
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode(errors="replace")
        with storage(self.path):
            end = os.fstat(self._writer).st_size
            try:
                written = os.write(self._writer, line)
                while written < len(line):
                    written += os.write(self._writer, line[written:])
            except OSError:
                os.ftruncate(self._writer, end)
                raise
            if time.monotonic() - self._synced > _SYNC_SECONDS:  # a power cut costs a second, not the throughput
                os.fsync(self._writer)
                self._synced = time.monotonic()
        self._places[int(entry["key"], 16)] = end << _FILES

    def read(self, key: str) -> dict[str, Any]:
        """The entry of ``key``. Raises KeyError where there is none."""
        place = self._places[int(key, 16)]
        number, offset = place & ((1 << _FILES) - 1), place >> _FILES
        if number not in self._readers:
            self._readers[number] = os.open(self._paths[number], os.O_RDONLY)
        size = _GUESS
        while b"\n" not in (line := os.pread(self._readers[number], size, offset)):
            size *= 8
        return json.loads(line[: line.index(b"\n")])

    def close(self) -> None:
        for descriptor in (self._writer, *self._readers.values()):
            os.close(descriptor)
        self._readers.clear()
        self._places.clear()  # a hundred bytes a completion, and whoever closed it may still hold it

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def keys_of(paths: Sequence[Path]) -> set[int]:
    """The keys in these journals, as numbers, read without a lock and without writing anything."""
    return {int(entry["key"], 16) for path in paths for _, entry in _entries(path)}


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each whole line's place and content; what stands behind the last line end was never acknowledged."""
    if not path.exists():
        return
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
                int(entry["key"], 16)
            except (ValueError, KeyError, TypeError):
                raise StorageError(
                    f"{path}:{number}: not a line of a journal: {line[:80]!r}. The file was changed by hand or "
                    "damaged: delete that line; what it held is asked for again."
                ) from None
            yield offset, entry
            offset += len(line)


def _cut_torn_tail(descriptor: int) -> None:
    """Drops what stands behind the last line end: it was never written whole."""
    size = os.fstat(descriptor).st_size
    end = size
    while end > 0:
        start = max(0, end - _GUESS)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end != size:
        os.ftruncate(descriptor, end)


def _lock(descriptor: int, path: Path) -> None:
    """One writer at a time: two commands on one run folder would pay for everything twice."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError(
            f"{path}: another process is writing to it. Wait until that command has ended, or choose another run_dir."
        ) from None
