"""Libraries that talk on their own are silenced where we report ourselves."""

from __future__ import annotations

import logging
import os
import warnings

_TALKATIVE = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "httpx",
    "huggingface_hub",
    "torch.utils._pytree",
    "torchao",
    "transformers",
)


def quiet_libraries() -> None:
    """No library progress bars, no advice on standard error; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("TRANSFORMERS", "DATASETS", "HF_HUB"):  # read when they are imported
        os.environ.setdefault(f"{name}_VERBOSITY", "error")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    warnings.filterwarnings("ignore", category=FutureWarning)
