"""Components: frozen, validated recipe sections, found by the folder that they lie in."""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
import pkgutil
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field


class Component(BaseModel):
    """A section of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=Component)


def kinds(base: type[C], package: str) -> dict[str, type[C]]:
    """Each ``kind`` defined in a module of ``package``, with its subclass of ``base``."""
    root = importlib.import_module(package)
    for module in pkgutil.iter_modules(root.__path__):
        importlib.import_module(f"{package}.{module.name}")
    found: dict[str, type[C]] = {}
    todo = list(base.__subclasses__())
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if inspect.isabstract(cls) or "kind" not in cls.model_fields or not cls.__module__.startswith(f"{package}."):
            continue
        kind = cls.model_fields["kind"].get_default()
        if kind in found and found[kind] is not cls:
            raise TypeError(f"two classes claim kind '{kind}': {found[kind]} and {cls}")
        found[kind] = cls
    return dict(sorted(found.items()))


def any_of(base: type[C], package: str) -> Any:
    """The pydantic type "any subclass of ``base`` in ``package``", told apart by ``kind``."""
    members = tuple(kinds(base, package).values())
    if len(members) == 1:
        return members[0]
    return Annotated[functools.reduce(operator.or_, members), Field(discriminator="kind")]
