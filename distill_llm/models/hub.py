"""What transformers loads by a name: from the Hub, from its cache where the Hub cannot be reached, or from a folder."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from distill_llm.core.errors import ConfigError
from distill_llm.core.hub import PROBE_SECONDS, why_unreachable


def from_hub(load: Any, source: str, revision: str, *, where: str, what: str, **options: Any) -> Any:
    if _looks_like_path(source) and not Path(source).expanduser().is_dir():
        raise ConfigError(
            f"{where}: there is no folder '{source}'. Expected a Hub id such as google/t5-v1_1-base or an existing "
            "folder with a Hugging Face model; if another recipe makes it, run that one first."
        )
    is_local = _looks_like_path(source)
    trouble = None if is_local else _why_unreachable(source)
    if trouble:
        options["local_files_only"] = True
    try:
        return load(str(Path(source).expanduser()) if is_local else source, revision=revision, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        if trouble:
            reason = f"the Hub cannot be reached ({trouble}) and no copy is in the cache."
        raise ConfigError(
            f"{where}: cannot load the {what} of '{source}' (revision {revision}): {reason} Check the spelling of the "
            "Hub id, the network, and `hf auth login` for a gated model, or give a local folder."
        ) from None


@functools.cache
def _why_unreachable(model: str) -> str | None:
    """Why the Hub says nothing of this model; an answer, even a bad one, is left to loading to explain."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return why_unreachable(lambda: HfApi().model_info(model, timeout=PROBE_SECONDS))
    except HfHubHTTPError:
        return None


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).is_dir()
