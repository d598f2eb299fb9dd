"""Splits of a data set on the Hugging Face Hub, with one clear error, and soon, where it cannot be had."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import DataError
from distill_llm.core.hub import PROBE_SECONDS, why_unreachable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from datasets import Dataset, DatasetDict

    from distill_llm.tasks.base import SplitName

_PARQUET_BRANCH = "refs/convert/parquet"
_log = logging.getLogger(__name__)


def hub_splits(name: str, splits: Mapping[SplitName, str], config: str | None) -> dict[SplitName, list[dict[str, Any]]]:
    """The rows of those ``splits`` (ours: the Hub's name) that the data set has; ``train`` is required.

    Class labels become their names (None where unknown). Without a network, a copy in the local cache is used.
    """
    from datasets.exceptions import DatasetsError

    offline = _probe(name)
    try:
        with _offline(offline is not None):
            found = _load(name, config)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = f"the Hub cannot be reached ({offline}) and no copy is in the cache" if offline else str(error)
        raise DataError(
            f"data '{name}'{f', config {config}' if config else ''}: it is no file or folder here, and it could not be "
            f"loaded from the Hugging Face Hub: {reason}. Expected a path or a Hub id: correct it, or download the "
            "data and give the folder as `task.data`."
        ) from error
    if splits["train"] not in found:
        raise DataError(
            f"data '{name}': it has no split '{splits['train']}', only {sorted(map(str, found))}. Name the right one."
        )
    return {ours: _rows(found[theirs]) for ours, theirs in splits.items() if theirs in found}


def _probe(name: str) -> str | None:
    """Why the Hub cannot be reached, or None."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        return why_unreachable(lambda: HfApi().dataset_info(name, timeout=PROBE_SECONDS))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(
            f"data '{name}': no such file or folder here, and no such data set on the Hugging Face Hub (or a private "
            "or gated one, which needs `hf auth login`). Expected a path or a Hub id: correct it."
        ) from error
    except HfHubHTTPError as error:
        return type(error).__name__


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Keeps ``datasets`` from trying a network that was just found missing."""
    from datasets import config as settings
    from huggingface_hub import constants

    before = settings.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if wanted:
        settings.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        settings.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _load(name: str, config: str | None) -> DatasetDict:
    """The data set; for one that is only a script, which ``datasets`` no longer runs, the Hub's Parquet copy of it."""
    from datasets import load_dataset

    try:
        return load_dataset(name, config)  # pyright: ignore[reportReturnType]
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        _log.info("data '%s' is a loading script; its Parquet copy (%s) is read instead", name, _PARQUET_BRANCH)
        return load_dataset(name, data_dir=config, revision=_PARQUET_BRANCH)  # pyright: ignore[reportReturnType]


def _rows(split: Dataset) -> list[dict[str, Any]]:
    from datasets import ClassLabel, Image

    for name, feature in split.features.items():
        if isinstance(feature, Image):  # its content, and not what Pillow makes of it
            split = split.cast_column(name, Image(decode=False))
    rows: list[dict[str, Any]] = split.to_list()
    for name, feature in split.features.items():
        if isinstance(feature, ClassLabel):
            for row in rows:
                value = row[name]
                row[name] = feature.int2str(value) if isinstance(value, int) and value >= 0 else None
    return rows
