"""What a model's card says of it: its licence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from distill_llm.core.hub import PROBE_SECONDS, why_unreachable


def licence_of(source: str, revision: str = "main") -> str:
    """The licence that the card of a folder or a Hub model names; "" where there is none, or no network."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        card = folder / "README.md"
        return _licence(_front_matter(card.read_text(encoding="utf-8"))) if card.is_file() else ""
    return _licence_on_hub(source, revision)


def _licence_on_hub(source: str, revision: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    found: list[Any] = []
    try:
        why_unreachable(lambda: found.append(HfApi().model_info(source, revision=revision, timeout=PROBE_SECONDS)))
    except (HfHubHTTPError, HFValidationError):
        return ""  # gated, private or gone: loading it will say so
    if not found:
        return ""
    said = _licence(found[0].card_data or {})
    tags = found[0].tags or ()
    return said or next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), "")


def _licence(card: Mapping[str, Any]) -> str:
    """`other` is the Hub's word for a licence that `license_name` names."""
    licence = card.get("license")
    if licence in ("", None, "other"):
        licence = card.get("license_name") or licence
    if isinstance(licence, list):
        return ", ".join(map(str, licence))
    return str(licence or "")


def _front_matter(text: str) -> Mapping[str, Any]:
    """The YAML between the two lines of dashes at a card's top; empty where it cannot be read."""
    head, _, rest = text.partition("\n")
    if head.strip() != "---":
        return {}
    try:
        found = yaml.safe_load(rest.split("\n---", 1)[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
