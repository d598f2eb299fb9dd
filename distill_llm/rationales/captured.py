"""The log-probabilities of kept rationales, read from the data set as numbers.

T tokens that the teacher wrote, K likeliest words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import StorageError
from distill_llm.rationales.dataset import KEPT

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

_ROWS_AT_ONCE = 256  # with all their words


@dataclass(frozen=True, slots=True)
class Heard:
    """What a teacher held likely while it wrote the completion ``key``.

    ``log_probs`` [T K] are at temperature 1, likeliest first; NaN, with the word -1, where fewer than K were told.
    """

    key: str
    tokens: list[int]
    top_words: np.ndarray[Any, Any]
    log_probs: np.ndarray[Any, Any]


def kept_keys(path: Path) -> dict[str, list[str]]:
    """The keys of each example's completions whose rationale is kept, in the order in which it is learned from."""
    found: dict[str, list[str]] = defaultdict(list)
    for batch in _kept(path, ["example_id", "key"]):
        for example, key in zip(batch["example_id"].to_pylist(), batch["key"].to_pylist(), strict=True):
            found[example].append(key)
    return dict(found)


def read_heard(path: Path, k: int) -> Iterator[Heard]:
    """The captures of completions whose rationale is kept; those without one are left out."""
    with _of_numbers(path):
        for batch in _kept(path, ["key", "logprobs"]):
            yield from _heard(batch, k)


def _heard(batch: Any, k: int) -> Iterator[Heard]:
    """Column by column: as Python objects, a word each, they would take a minute for ten thousand rationales."""
    import numpy as np
    import pyarrow as pa

    rows = batch["logprobs"]
    places, starts = rows.flatten(), _starts(rows)
    tops = places.field("top")
    words = tops.flatten()
    counts, first = _lengths(tops), _starts(tops)
    tokens = places.field("token").cast(pa.int64()).to_numpy(zero_copy_only=False)
    number = np.arange(len(words)) - np.repeat(first[:-1], counts)
    place = np.repeat(np.arange(len(places)), counts)
    within = number < k
    at = place[within], number[within]
    top_words = np.full((len(places), k), -1, np.int64)
    log_probs = np.full((len(places), k), np.nan)
    top_words[at] = words.field("token").cast(pa.int64()).to_numpy(zero_copy_only=False)[within]
    log_probs[at] = words.field("logprob").to_numpy(zero_copy_only=False)[within]
    for row, key in enumerate(batch["key"].to_pylist()):
        own = slice(starts[row], starts[row + 1])
        if own.stop > own.start:
            yield Heard(key, tokens[own].tolist(), top_words[own], log_probs[own])


def _lengths(lists: Any) -> np.ndarray[Any, Any]:
    return lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)


def _starts(lists: Any) -> np.ndarray[Any, Any]:
    """Where each list begins among all their items, and where the last ends."""
    import numpy as np

    return np.concatenate([[0], np.cumsum(_lengths(lists), dtype=np.int64)])


def _kept(path: Path, columns: list[str]) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["outcome", *columns]):
            yield batch.filter(pa.array([outcome == KEPT for outcome in batch["outcome"].to_pylist()]))


@contextmanager
def _of_numbers(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, KeyError) as error:
        raise StorageError(
            f"{path}: it holds no log-probabilities of token ids ({error}). Delete it: it is made again from the "
            "journal, without asking the teacher."
        ) from None
