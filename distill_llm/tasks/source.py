"""Rows of a data set: from a local file, a local folder with expected file names, or the Hugging Face Hub."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.core.assets import find_file
from distill_llm.core.errors import DataError
from distill_llm.tasks.hub import hub_splits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distill_llm.tasks.base import SplitName

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
USUAL_STEMS: Mapping[SplitName, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "test": ("test",),
}
"""What files of splits are called where nothing else was agreed."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Row(dict[str, Any]):
    """One row, which knows where it stands: every complaint about it names file, row and fields."""

    __slots__ = ("number", "where")  # of a million rows each would carry a dictionary more

    def __init__(self, fields: Mapping[str, Any], where: str, number: int):
        super().__init__(fields)
        self.where = where
        self.number = number

    def text(self, name: str) -> str:
        """A field that must be there and must not be empty."""
        found = self.optional(name)
        if found is None:
            came = "is empty" if name in self else f"is missing; the row has {sorted(self)}"
            raise DataError(
                f"{self.where}, row {self.number}: the field '{name}' {came}. Expected text in it: fill it in, remove "
                "the row, or name another field."
            )
        return found

    def optional(self, name: str) -> str | None:
        """A field as text, None where it is missing or empty."""
        value = self.get(name)
        if isinstance(value, (list, dict)):
            raise DataError(
                f"{self.where}, row {self.number}: the field '{name}' is a {type(value).__name__}. Expected text or a "
                "number: name another field."
            )
        return None if value is None or not str(value).strip() else str(value)

    def image(self, name: str) -> str | bytes:
        """A field that must be an image: its content, or the path of a file."""
        value = self.get(name)
        if isinstance(value, dict):  # as `datasets` and Parquet files of the Hub hold images
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, str | bytes) or not value:
            came = f"is a {type(value).__name__}" if name in self else f"is missing; the row has {sorted(self)}"
            raise DataError(
                f"{self.where}, row {self.number}: the field '{name}' {came}. Expected an image, or the path of an "
                "image file: fill it in, or name another field."
            )
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that must be a list of texts, or such a list written as JSON."""
        value = self.get(name)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                value = None
        if not isinstance(value, list) or not value or not all(str(one).strip() for one in value):
            came = f"is {self[name]!r}" if name in self else f"is missing; the row has {sorted(self)}"
            raise DataError(
                f"{self.where}, row {self.number}: the field '{name}' {came}. Expected a list of texts, none empty."
            )
        return tuple(str(one) for one in value)


@dataclass(frozen=True)
class Layout:
    """Which file of a folder, and which split of a Hub data set, is which split of ours."""

    stems: Mapping[SplitName, tuple[str, ...]]
    hub: Mapping[SplitName, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    hub_config: str | None = None


def read_splits(data: str, layout: Layout) -> dict[SplitName, list[Row]]:
    """The splits that ``data`` (file, folder or Hub id) has; a single file is all ``train``.

    Raises DataError where nothing is found, or where what is found cannot be read.
    """
    path = find_file(data)
    if path is not None:
        return _folder(path, layout) if path.is_dir() else {"train": read_file(path)}
    if _HUB_ID.fullmatch(data) is None or Path(data).suffix in SUFFIXES:
        raise DataError(
            f"data '{data}': no such file or folder (looked from {Path.cwd()}). Expected a file {_kinds()}, a folder "
            "with such files, or the id of a data set on the Hugging Face Hub: correct the path."
        )
    return {
        ours: [Row(row, f"{data}, split {layout.hub[ours]}", i + 1) for i, row in enumerate(rows)]
        for ours, rows in hub_splits(data, layout.hub, layout.hub_config).items()
    }


def read_file(path: Path) -> list[Row]:
    """All rows of one file; the suffix says how to read it, and a ``.json`` may hold a list or JSON lines."""
    return list(stream_file(path))


def stream_file(path: Path, *, bare_field: str = "") -> Iterator[Row]:
    """The rows of one file one by one; only a list in a JSON file is in memory as a whole.

    ``bare_field``: a text, or a list of texts, that stands where JSON should have an object is that field of a row.
    """
    json_rows = partial(_json, bare_field=bare_field)
    readers = {".json": json_rows, ".jsonl": json_rows, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read '{path.suffix}' files. Expected {_kinds()}: convert the file.")
    where, number = str(path), 0
    try:
        for number, fields in enumerate(reader(path), start=1):
            yield Row(fields, where, number)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}. Check the file and its rights.") from error
    if not number:
        raise DataError(f"{path}: it has no rows. Expected at least one: check that the file was written completely.")


def split_files(folder: Path, stems: Mapping[SplitName, tuple[str, ...]]) -> dict[SplitName, Path]:
    """The file of each split that ``folder`` has, by its name without the suffix; the first of ``stems`` counts."""
    found: dict[SplitName, Path] = {}
    for split, names in stems.items():
        files = [folder / f"{stem}{suffix}" for stem in names for suffix in SUFFIXES]
        file = next((file for file in files if file.is_file()), None)
        if file is not None:
            found[split] = file
    return found


def _folder(path: Path, layout: Layout) -> dict[SplitName, list[Row]]:
    files = split_files(path, layout.stems)
    if "train" in layout.stems and "train" not in files:
        raise DataError(
            f"folder {path}: no training file. Expected {' or '.join(layout.stems['train'])} with one of "
            f"{', '.join(SUFFIXES)}; it has {sorted(entry.name for entry in path.iterdir())[:20]}. Rename the file, or "
            "name it as `data`."
        )
    return {split: read_file(file) for split, file in files.items()}


def _json(path: Path, bare_field: str) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == "[":
            yield from _json_list(path, file.read(), bare_field)
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path}:{number}: not valid JSON ({error}). Expected one object a line, or one list in the whole "
                    "file: correct the line."
                ) from error
            yield _object(row, f"{path}:{number}", bare_field)


def _json_list(path: Path, text: str, bare_field: str) -> Iterator[Mapping[str, Any]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        expected = "objects or texts" if bare_field else "objects"
        raise DataError(f"{path}:{line}: not valid JSON ({error}). Expected one list of {expected}.") from error
    for number, row in enumerate(rows, start=1):
        yield _object(row, f"{path}, row {number}", bare_field)


def _object(row: object, where: str, bare_field: str) -> Mapping[str, Any]:
    if bare_field and isinstance(row, str | list):
        return {bare_field: row}
    if not isinstance(row, dict):
        expected = " or a text" if bare_field else ""
        raise DataError(
            f'{where}: it is a {type(row).__name__}. Expected an object such as {{"question": "..."}}{expected}.'
        )
    return row


def _csv(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for row in rows:
                if None in row:
                    raise DataError(
                        f"{path}:{rows.line_num}: more columns than the header's {rows.fieldnames}. Quote the values "
                        "that hold a comma."
                    )
                yield row
        except csv.Error as error:
            raise DataError(f"{path}:{rows.reader.line_num}: not valid CSV ({error}). Correct the line.") from error


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error}). Write it again.") from error


def _kinds() -> str:
    return f"of the kind {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
