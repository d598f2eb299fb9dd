"""Checkpoints in which weights have other names than in the model: transformers renames those of some families when it
saves them, and back when it loads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.core.files import read_json

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_renamed(model: Any, folder: Path) -> None:
    """Gives ``model`` the weights of a checkpoint that has other names for some; does nothing where all are its own.

    Trainer loads by name, and what it does not find it leaves as it is, in silence: such a training would go on with
    half of its weights, and its best checkpoint would not be the model.
    """
    if _names(folder) <= set(model.state_dict()):
        return
    loaded = type(model).from_pretrained(folder)
    model.load_state_dict(loaded.state_dict(), strict=False)  # heads beside the model are not in it


def _names(folder: Path) -> AbstractSet[str]:
    """Of all weights in a folder; none where it holds an adapter, or what a wrapper made of the model."""
    from safetensors import safe_open

    if (folder / _INDEX).is_file():
        return set(read_json(folder / _INDEX)["weight_map"])
    if not (folder / _WHOLE).is_file():
        return set()
    with safe_open(folder / _WHOLE, framework="pt") as file:
        return set(file.keys())
