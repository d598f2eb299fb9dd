"""Optional packages: imported where they are needed, with the install command where they are missing."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from distill_llm.core.errors import ConfigError


def is_there(package: str) -> bool:
    """Whether a package is installed, or one inside it, which an older version may lack."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def need(package: str, extra: str, *, where: str) -> None:
    """Raises ConfigError where ``package``, which the optional dependencies ``extra`` hold, is not installed."""
    if not is_there(package):
        raise ConfigError(
            f"{where}: this needs the package '{package}', which is not installed. Type: "
            f"pip install 'distill-llm[{extra}]'"
        )


def load_extra(package: str, extra: str, *, where: str) -> ModuleType:
    """The module ``package``; ConfigError where it is not installed."""
    need(package, extra, where=where)
    return importlib.import_module(package)
