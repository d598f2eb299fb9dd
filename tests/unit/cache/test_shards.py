"""Shards: rows are found by their keys, in any order; what is damaged, missing or of another teacher is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.torch import load_file

from distill_llm.cache.manifest import make_manifest, must_match, read_manifest, write_manifest
from distill_llm.cache.shards import Shards, ShardWriter
from distill_llm.core.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from pathlib import Path

LENGTHS = {7: 3, 2**63 - 1: 1, 12: 5, 0: 2, 99: 4}


def _columns(key: int) -> dict[str, np.ndarray[Any, Any]]:
    made = np.random.default_rng(key % 1000)
    count = LENGTHS[key]
    return {
        "bytes": made.integers(0, 256, (count, 3)).astype(np.uint8),
        "shorts": made.integers(0, 2**16, (count, 2)).astype(np.uint16),
        "floats": made.normal(size=(count, 4)).astype(np.float32),
    }


def _write(folder: Path, keys: list[int], *, shard_bytes: int = 1, process: int = 0) -> list[Path]:
    writer = ShardWriter(folder, shard_bytes=shard_bytes, process=process)
    for key in keys:
        writer.add(key, _columns(key))
    writer.flush()
    return sorted(folder.glob("shard-*"))


@pytest.mark.parametrize(("shard_bytes", "files"), [(1, 5), (200, 2), (10**6, 1)])
def test_rows_come_back_by_key_whatever_the_shards(tmp_path: Path, shard_bytes: int, files: int) -> None:
    assert len(_write(tmp_path, list(LENGTHS), shard_bytes=shard_bytes)) == files
    shards = Shards(tmp_path)
    assert len(shards) == 5
    wanted = [99, 7, 99, 2**63 - 1]
    columns, counts = shards.read(wanted)
    assert counts == [4, 3, 4, 1]
    for name, column in columns.items():
        np.testing.assert_array_equal(column, np.concatenate([_columns(key)[name] for key in wanted]))


def test_a_shard_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    (path,) = _write(tmp_path, [7, 12], shard_bytes=10**6)
    tensors = load_file(path)
    assert tensors["row_keys"].tolist() == [7, 12]
    assert tensors["row_tokens"].tolist() == [3, 5]
    np.testing.assert_array_equal(tensors["floats"][3:].numpy(), _columns(12)["floats"])


def test_a_row_that_is_not_there_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    _write(tmp_path, [7, 12])
    shards = Shards(tmp_path)
    assert shards.missing([7, 12, 0, 1]) == 2
    with pytest.raises(StorageError, match=r"holds 2 rows.*key 1\).*distill-llm cache-signals RECIPE"):
        shards.read([7, 1])


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_shard_is_named_and_the_others_are_kept(tmp_path: Path, harm: str) -> None:
    paths = _write(tmp_path, list(LENGTHS))
    content = bytearray(paths[2].read_bytes())
    content[-1] ^= 1
    paths[2].write_bytes({"flip": bytes(content), "cut": bytes(content[:-9]), "empty": b""}[harm])
    with pytest.raises(StorageError, match=rf"{paths[2].name}: this shard of the cache is damaged.*Delete the file"):
        Shards(tmp_path)
    paths[2].unlink()
    assert Shards(tmp_path).missing(LENGTHS) == 1


def test_processes_and_runs_beside_each_other_do_not_overwrite(tmp_path: Path) -> None:
    _write(tmp_path, [7, 12], process=0)
    _write(tmp_path, [99, 0], process=1)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    _write(tmp_path, [7], process=1)  # of a run that did not see the first one's
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}.items()
    assert len(Shards(tmp_path)) == 4
    assert Shards(tmp_path).read([7])[1] == [3]


def test_a_torn_draft_is_not_a_shard(tmp_path: Path) -> None:
    _write(tmp_path, [7])
    (tmp_path / ".shard-0-abc.safetensors.123.part").write_bytes(b"torn")
    assert len(Shards(tmp_path)) == 1


MADE: dict[str, Any] = {
    "payload": {"kind": "top_k", "k": 4},
    "teacher": {"kind": "frozen", "weights": "a@1", "load_in": "full"},
    "vocabulary": {"a": 0, "b": 2},
    "temperatures": (1.0, 2.0),
}


def test_the_same_manifest_matches_and_none_is_none(tmp_path: Path) -> None:
    assert must_match(tmp_path, make_manifest(**MADE)) is None
    write_manifest(tmp_path, make_manifest(**MADE))
    assert must_match(tmp_path, make_manifest(**MADE)) == read_manifest(tmp_path)
    assert must_match(tmp_path, make_manifest(**MADE | {"temperatures": (2.0,)})), "what is there suffices"
    assert make_manifest(**MADE)["width"] == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"payload": {"kind": "top_k", "k": 5}}, r"payload\.k: 4 there, 5 here"),
        ({"payload": {"kind": "sampled", "samples": 5}}, r"payload\.kind: 'top_k' there, 'sampled' here"),
        ({"teacher": {"kind": "frozen", "weights": "a@2"}}, r"teacher\.load_in: 'full' there, None here"),
        ({"teacher": MADE["teacher"] | {"weights": "a@2"}}, r"teacher\.weights: 'a@1' there, 'a@2' here"),
        ({"vocabulary": {"b": 0, "a": 2}}, r"tokenizer: '\w+' there, '\w+' here"),
        ({"temperatures": (1.0, 3.0)}, r"temperatures: \[1\.0, 2\.0\] there, \[1\.0, 3\.0\] here"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_another_manifest_is_refused_with_what_differs(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    write_manifest(tmp_path, make_manifest(**MADE))
    with pytest.raises(ConfigError, match=rf"(?s)made otherwise:.*{said}.*Choose another folder"):
        must_match(tmp_path, make_manifest(**MADE | change))
