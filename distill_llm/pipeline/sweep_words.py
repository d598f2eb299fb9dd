"""Words short enough for tables and plots: of the keys that a sweep varies, and of their values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from distill_llm.core.errors import ConfigError
from distill_llm.recipe.load import parse_yaml

_LONGEST = 28


def written(value: Any) -> str:
    """A value as an override takes it: bare where YAML reads the same text, as JSON otherwise."""
    if isinstance(value, str):
        try:
            if value and parse_yaml(value, "value") == value:
                return value
        except ConfigError:
            pass
    return json.dumps(value, ensure_ascii=False, default=str)


def short_keys(paths: Sequence[str]) -> list[str]:
    """The last words of each path: as few as tell it from the others."""
    names = []
    for path in paths:
        words = path.split(".")
        ends = [[".".join(other.split(".")[-count:]) for other in paths] for count in range(1, len(words) + 1)]
        own = (".".join(words[-count:]) for count in range(1, len(words) + 1))
        names.append(next((end for end, others in zip(own, ends, strict=True) if others.count(end) == 1), path))
    return names


def short_values(values: Sequence[Any]) -> list[str]:
    """Each value in a few letters, and no two alike: of paths and mappings, what differs."""
    if len(values) > 1 and all(isinstance(value, dict) for value in values):
        texts = [
            ", ".join(f"{key}: {_plain(value[key])}" for key in value if _differs(key, values)) for value in values
        ]
    elif len(values) > 1 and all(isinstance(value, str) and "/" in value for value in values):
        texts = _what_differs([value.rstrip("/").split("/") for value in values])
    else:
        texts = [_plain(value) for value in values]
    cut = [text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..." for text in texts]
    return [
        text if text and cut.count(text) == 1 else f"{number}: {text}".strip()
        for number, text in enumerate(cut, start=1)
    ]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str).replace('"', "")


def _differs(key: str, values: Sequence[dict[str, Any]]) -> bool:
    return any(value.get(key) != values[0].get(key) or key not in value for value in values)


def _what_differs(paths: list[list[str]]) -> list[str]:
    """Without the folders that all begin and end with; each keeps one at least."""
    while all(len(path) > 1 for path in paths) and len({path[0] for path in paths}) == 1:
        paths = [path[1:] for path in paths]
    while all(len(path) > 1 for path in paths) and len({path[-1] for path in paths}) == 1:
        paths = [path[:-1] for path in paths]
    return ["/".join(path) for path in paths]
