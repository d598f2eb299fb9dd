"""Recipes, exemplars and sample data: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def asset_root() -> Path:
    """The folder that holds ``recipes/`` and ``data/``."""
    installed = _PACKAGE / "assets"
    return installed if installed.is_dir() else _PACKAGE.parent


def find_file(path: str) -> Path | None:
    """``path`` as the user wrote it, or the file of that name that came with the package, or None."""
    for candidate in (Path(path).expanduser(), asset_root() / path):
        if candidate.exists():
            return candidate
    return None
