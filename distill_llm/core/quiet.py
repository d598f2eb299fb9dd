"""Libraries that talk on their own are silenced where we report ourselves."""

from __future__ import annotations

import logging
import os
import warnings

_TORCHAO = ("torchao", "torch.utils._pytree")
"""At its import, of kernels for machines that this one is not, and of how it registers its own types."""


def quiet_libraries() -> None:
    """No library progress bars, no advice on standard error; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("TRANSFORMERS", "DATASETS", "HF_HUB"):  # read when they are imported
        os.environ.setdefault(f"{name}_VERBOSITY", "error")
    for name in ("transformers", "datasets", "accelerate", "huggingface_hub", "httpx", "bitsandbytes", *_TORCHAO):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    warnings.filterwarnings("ignore", category=FutureWarning)
