"""Shards: files of whole rows, each there whole or not at all, whose names say what their bytes must be.

R rows, N tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from distill_llm.core.errors import StorageError
from distill_llm.core.files import atomic, file_fingerprint

if TYPE_CHECKING:
    import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"
Columns: TypeAlias = Mapping[str, Array]
"""One or more numbers for each token, by name; all as long as there are tokens."""

_KEYS, _TOKENS = "row_keys", "row_tokens"
_TYPES = {"U8": "uint8", "U16": "uint16", "I32": "int32", "I64": "int64", "F32": "float32", "BF16": "uint16"}


class ShardWriter:
    """Gathers rows, and writes a shard whenever they make ``shard_bytes``. ``process`` is part of the files' names."""

    def __init__(self, folder: Path, *, shard_bytes: int, process: int = 0, bfloat16: Sequence[str] = ()):
        self._folder, self._shard_bytes, self._process = folder, shard_bytes, process
        self._bfloat16 = frozenset(bfloat16)
        self._keys: list[int] = []
        self._rows: list[Columns] = []
        self._waiting = 0
        self.num_bytes = 0

    def add(self, key: int, columns: Columns) -> None:
        """A row; it is on disk once its shard is full, or after ``flush``."""
        self._keys.append(key)
        self._rows.append(columns)
        self._waiting += sum(column.nbytes for column in columns.values())
        if self._waiting >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        if not self._rows:
            return
        import numpy as np
        import torch
        from safetensors.torch import save

        counts = [len(next(iter(row.values()))) for row in self._rows]
        columns = {name: np.concatenate([row[name] for row in self._rows]) for name in self._rows[0]}
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        tensors |= {name: tensors[name].view(torch.bfloat16) for name in self._bfloat16}
        tensors |= {_KEYS: torch.tensor(self._keys), _TOKENS: torch.tensor(counts, dtype=torch.int32)}
        content = save(tensors)
        name = f"shard-{self._process}-{_fingerprint(content)}.safetensors"
        with atomic(self._folder / name) as draft:
            draft.write_bytes(content)
        self.num_bytes += len(content)
        self._keys, self._rows, self._waiting = [], [], 0


@dataclass(frozen=True, slots=True)
class _Shard:
    ends: Array
    columns: Columns


class Shards:
    """All rows of a folder's shards, found by their keys; the files are mapped into memory, not read into it.

    Opening reads every byte once, to compare it with what the names say. Raises StorageError where one is damaged.
    """

    def __init__(self, folder: Path):
        import numpy as np

        self.folder = folder
        self._shards: list[_Shard] = []
        self._places: dict[int, tuple[int, int]] = {}
        self.num_bytes = 0
        for path in sorted(folder.glob("shard-*.safetensors")):
            _verify(path)
            columns = _mapped(path)
            keys, counts = columns.pop(_KEYS), columns.pop(_TOKENS)
            number = len(self._shards)
            self._places |= {int(key): (number, row) for row, key in enumerate(keys)}
            self._shards.append(_Shard(np.cumsum(counts, dtype=np.int64), columns))
            self.num_bytes += path.stat().st_size

    def __contains__(self, key: int) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def missing(self, keys: Iterable[int]) -> int:
        """How many of ``keys`` are not there."""
        return sum(key not in self._places for key in keys)

    def read(self, keys: Sequence[int]) -> tuple[dict[str, Array], list[int]]:
        """The columns of these rows, one row behind the other, and each row's number of tokens.

        Raises StorageError where a row is not there.
        """
        import numpy as np

        spans = [self._span(key) for key in keys]
        names = self._shards[0].columns if self._shards else ()
        columns = {name: np.concatenate([shard.columns[name][a:b] for shard, a, b in spans]) for name in names}
        return columns, [stop - start for _, start, stop in spans]

    def _span(self, key: int) -> tuple[_Shard, int, int]:
        place = self._places.get(key)
        if place is None:
            raise StorageError(
                f"{self.folder}: the cache holds {len(self)} rows, but not one that is to be learned from (key {key}). "
                "Rows have changed since it was written. First type: distill-llm cache-signals RECIPE (rows that are "
                "there are not computed again)."
            )
        shard, row = self._shards[place[0]], place[1]
        return shard, int(shard.ends[row - 1]) if row else 0, int(shard.ends[row])


def _fingerprint(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _verify(path: Path) -> None:
    expected = path.stem.rpartition("-")[2]
    found = file_fingerprint(path)
    if found != expected:
        raise StorageError(
            f"{path}: this shard of the cache is damaged (its bytes give {found}, its name says {expected}). Delete "
            "the file and type: distill-llm cache-signals RECIPE. Only the rows that it held are computed again."
        )


def _mapped(path: Path) -> dict[str, Array]:
    """The file's tensors as views; bfloat16, which numpy lacks, as the two bytes that it is."""
    import numpy as np

    content = np.memmap(path, np.uint8, "r")
    size = int.from_bytes(content[:8].tobytes(), "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + size].tobytes())
    found = {}
    for name, about in header.items():
        if name != "__metadata__":
            start, stop = (8 + size + offset for offset in about["data_offsets"])
            found[name] = content[start:stop].view(_TYPES[about["dtype"]]).reshape(about["shape"])
    return found
