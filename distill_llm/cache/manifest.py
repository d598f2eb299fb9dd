"""The manifest of a cache: all that decides what stands in it, so that signals of another teacher are never learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from distill_llm.core.errors import ConfigError
from distill_llm.core.files import fingerprint, read_json, write_json

Manifest: TypeAlias = dict[str, Any]

FORMAT = 1
_FILE = "manifest.json"


def make_manifest(
    *,
    payload: Mapping[str, Any],
    teacher: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    temperatures: tuple[float, ...],
) -> Manifest:
    """``teacher``: all that decides its signals. ``temperatures`` matter only to payloads that fix them."""
    return {
        "format": FORMAT,
        "payload": dict(payload),
        "teacher": dict(teacher),
        "tokenizer": fingerprint(dict(sorted(vocabulary.items()))),
        "width": max(vocabulary.values()) + 1,
        "temperatures": list(temperatures),
    }


def read_manifest(folder: Path) -> Manifest | None:
    """That of the cache in ``folder``; None where there is none yet."""
    path = folder / _FILE
    return read_json(path) if path.exists() else None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / _FILE, manifest)


def must_match(folder: Path, here: Manifest) -> Manifest | None:
    """The manifest in ``folder``, None without one. Raises ConfigError, with the keys that differ, where it is not
    that of ``here``; a cache of more temperatures than are asked for will do."""
    there = read_manifest(folder)
    if there is None:
        return None
    before, now = dict(_flat(there)), dict(_flat(here))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if set(here["temperatures"]) <= set(there.get("temperatures", ())):
        changed = [key for key in changed if key != "temperatures"]
    if changed:
        shown = "\n".join(f"  {key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in changed[:8])
        more = f"\n  and {len(changed) - 8} more" if len(changed) > 8 else ""
        raise ConfigError(
            f"{folder}: this cache of signals was made otherwise:\n{shown}{more}\nChoose another folder (`folder` of "
            "the cached teacher, or run_dir=runs/another), or delete this one to write it anew."
        )
    return there


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{path}.{key}" if path else str(key))
