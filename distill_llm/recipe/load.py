"""Reading recipes: YAML, overrides from the command line, and errors that say where and what to do."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from distill_llm.core.assets import find_file
from distill_llm.core.errors import ConfigError
from distill_llm.recipe.recipe import Recipe


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, and reads 1e-4 as the number that it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not readable YAML: {str(error).strip()}") from None


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at ``path`` (or of that name among those that came with the package), with ``key=value`` overrides.

    Raises ConfigError that names the YAML path, the value, what was expected and the nearest right key.
    """
    return recipe_from(read_recipe(path), overrides, source=str(path))


def recipe_from(data: Any, overrides: Sequence[str] = (), *, source: str = "recipe") -> Recipe:
    """The recipe that a mapping (as read from YAML) describes."""
    data = overridden(data, overrides, source=source)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [f"  {_explain(details, data)}" for details in _telling(error.errors(), data)]
        raise ConfigError("\n".join([f"{source} is not a valid recipe:", *lines])) from None


def overridden(data: Any, overrides: Sequence[str], *, source: str = "recipe") -> dict[str, Any]:
    """A copy of a recipe's mapping with ``key=value`` overrides, unchecked."""
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected a mapping with the keys name, task, student, objective, train.")
    data = copy.deepcopy(data)
    for override in overrides:
        _apply(data, override)
    return data


def value_at(data: Any, path: str) -> Any:
    """What stands at ``path``, written as in an override; None where nothing does."""
    place = data
    for key in path.split("."):
        if isinstance(place, list):
            named = [item for item in place if isinstance(item, dict) and item.get("name") == key]
            place = named[0] if named else place[int(key)] if key.isdigit() and int(key) < len(place) else None
        else:
            place = place.get(key) if isinstance(place, dict) else None
    return place


def read_recipe(path: str | Path) -> Any:
    """What stands in a recipe's file, unchecked."""
    found = find_file(str(path))
    if found is None or found.is_dir():
        raise ConfigError(
            f"{path}: there is no such recipe. Expected a YAML file, such as recipes/t5-base.yaml; "
            "`distill-llm recipe list` names those that came with the package."
        )
    return parse_yaml(found.read_text(encoding="utf-8"), str(path))


def _apply(data: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override '{override}': expected key=value, such as train.max_steps=100.")
    *parents, last = path.split(".")
    place: Any = data
    for key in parents:
        place = _step_into(place, key, path)
    # nothing behind `=` is an empty text, as a shell leaves of `key=""`; null is written out
    _set(place, last, parse_yaml(value, f"override '{override}'") if value else "", path)


def _step_into(place: Any, key: str, path: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, key, path)]
    if not isinstance(place, dict):
        raise ConfigError(f"override {path}: '{key}' is looked for in {place!r}, which has no keys.")
    if place.get(key) is None:
        place[key] = {}
    return place[key]


def _set(place: Any, key: str, value: Any, path: str) -> None:
    if isinstance(place, list):
        place[_index(place, key, path)] = value
    elif isinstance(place, dict):
        place[key] = value
    else:
        raise ConfigError(f"override {path}: '{key}' cannot be set in {place!r}, which has no keys.")


def _index(items: list[Any], key: str, path: str) -> int:
    """A place in a list, by number or by the ``name`` of the item that stands there."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(items):
        return int(key)
    known = [name for name in names if name] or f"0 to {len(items) - 1}"
    raise ConfigError(f"override {path}: '{key}' is not in the list; expected one of {known}.")


def _telling(errors: Sequence[Mapping[str, Any]], data: Any) -> list[Mapping[str, Any]]:
    """Without what only follows from another error: a list that lost its faulty items, a union's other branch."""
    kept = []
    for details in errors:
        loc = tuple(details["loc"])
        deeper = any(tuple(other["loc"])[: len(loc)] == loc and len(other["loc"]) > len(loc) for other in errors)
        if not (deeper and details["type"] == "too_short") and not _is_other_branch(details, errors, data):
            kept.append(details)
    return kept or list(errors)


def _is_other_branch(details: Mapping[str, Any], errors: Sequence[Mapping[str, Any]], data: Any) -> bool:
    """Where a text or number may stand as well as a section: it speaks of the one that was not written."""
    *parents, last = details["loc"] or [""]
    value = _locate(parents, data)[1]
    if details["type"] in ("string_type", "float_type"):
        return isinstance(value, dict) and last not in value
    beside = [other for other in errors if tuple(other["loc"][:-1]) == tuple(parents) and other is not details]
    is_tag = isinstance(last, str) and not isinstance(value, dict)
    return details["type"] == "model_type" and is_tag and bool(beside)


def _explain(details: Mapping[str, Any], data: Any) -> str:
    path, value, schema_path = _locate(details["loc"], data)
    where = ".".join(path) or "recipe"
    message = str(details["msg"]).removeprefix("Value error, ")
    if details["type"] == "extra_forbidden":
        known = known_keys(schema_path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else f" Known keys: {', '.join(sorted(known))}."
        return f"{where}: there is no such key (its value is {value!r}).{hint}"
    if details["type"] == "missing":
        return f"{where}: this key is required and missing."
    if details["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"{where}: {_unknown_kind(details)}"
    if details["type"] == "value_error":
        return (
            message
            if message.startswith(("objective.", "objective:", "evaluate.", "scheme:"))
            else f"{where}: {message}."
        )
    return f"{where}: {message}; it is {value!r}."


def _unknown_kind(details: Mapping[str, Any]) -> str:
    context = details.get("ctx", {})
    expected = re.findall(r"'([^']+)'", str(context.get("expected_tags", "")))
    if details["type"] == "union_tag_not_found":
        return "needs a `kind`."
    near = difflib.get_close_matches(str(context.get("tag")), expected, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"kind '{context.get('tag')}' is not known; expected one of {', '.join(expected)}.{hint}"


def _locate(loc: Sequence[str | int], data: Any) -> tuple[list[str], Any, list[str]]:
    """The path as the user wrote it (pydantic adds the tag of each union), the value, and the path with tags.

    An item of a list is called by its ``name`` where it has one, as overrides do.
    """
    path: list[str] = []
    place: Any = data
    for number, step in enumerate(loc):
        is_last = number == len(loc) - 1
        if isinstance(place, dict) and step in place:
            place = place[step]
            path.append(str(step))
        elif isinstance(place, list) and isinstance(step, int) and step < len(place):
            place = place[step]
            path.append(str(place.get("name", step)) if isinstance(place, dict) else str(step))
        elif isinstance(place, dict) and is_last and place.get("kind") != step:
            place = None
            path.append(str(step))
    return path, place, [str(step) for step in loc]


def known_keys(path: Sequence[str]) -> list[str]:
    """The keys that a recipe may have at ``path`` (union tags included)."""
    schema = Recipe.model_json_schema()
    definitions, node = schema.get("$defs", {}), schema
    for step in path:
        node = _resolve(_descend(_resolve(node, definitions), step, definitions), definitions)
    return list(_resolve(node, definitions).get("properties", {}))


def _resolve(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in node:
        node = definitions[str(node["$ref"]).rsplit("/", 1)[-1]]
    choices = [choice for choice in node.get("anyOf", ()) if choice.get("type") != "null"]
    return _resolve(choices[0], definitions) if len(choices) == 1 else node


def _descend(node: Mapping[str, Any], step: str, definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    if step in node.get("properties", {}):
        return node["properties"][step]
    if "discriminator" in node and step in node["discriminator"]["mapping"]:
        return {"$ref": node["discriminator"]["mapping"][step]}
    for choice in node.get("anyOf", ()):
        resolved = _resolve(choice, definitions)
        if "properties" in resolved:
            return resolved
    if isinstance(node.get("items"), dict):
        return node["items"]
    others = node.get("additionalProperties")
    return others if isinstance(others, dict) else {}
