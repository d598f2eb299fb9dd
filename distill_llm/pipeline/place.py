"""The machine that a plan is made for: what it has free, and how fast it is."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from distill_llm.core.errors import ConfigError

if TYPE_CHECKING:
    from distill_llm.pipeline.time_model import Machine

KERNELS = 40 * 2**20
"""Of code and scratch memory that a process takes when it computes for the first time on a CPU (docs/benchmarks.md)."""
_OF_A_TRAINING = (
    "distill_llm.pipeline.student_stage",
    "distill_llm.training.train",
    "distill_llm.models.cpu_training",
    "distill_llm.models.generate",
    "distill_llm.evaluation.predict",
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str, *, where: str) -> int:
    """Bytes of ``16GiB``, ``24GB`` or a plain number. Raises ConfigError for anything else."""
    import re

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B?)?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0 or (found[3] and not found[2]):
        raise ConfigError(f"{where}: '{text}' is no size. Expected one such as 16GiB, 24GB or 800MiB.")
    letter = (found[2] or "").upper()
    unit = 1024 ** "_KMGT".index(letter) if found[3] and letter else _UNITS[letter]
    return round(float(found[1]) * unit)


def simulated_device(asked: str) -> str:
    """cpu or cuda, for a device that was asked for, or for the one that is here. Raises ConfigError for another."""
    from distill_llm.pipeline.time_model import DEVICES

    if asked in ("", "auto"):
        from distill_llm.models.generate import default_device

        return default_device()
    if asked not in ("cpu", "cuda", *DEVICES):
        raise ConfigError(f"--device: '{asked}' is not known. Expected cpu, cuda or one of {', '.join(DEVICES)}.")
    return "cpu" if asked == "cpu" else "cuda"


def machine_of(asked: str) -> Machine:
    """Measures this machine, or looks a GPU up. Raises ConfigError where `cuda` is not here."""
    from distill_llm.pipeline.time_model import DEVICES, measured, of_sheet

    if asked in DEVICES:
        return of_sheet(asked)
    device = simulated_device(asked)
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                f"--device: there is no GPU here that torch {torch.__version__} sees. Name the one that you mean, of "
                f"{', '.join(DEVICES)}, or plan for the cpu."
            )
    return measured(device)


def free_memory(device: str, machine: Machine) -> tuple[int, str]:
    """Bytes that can be had, and where that is known from."""
    if machine.memory is not None:
        return machine.memory, f"what {machine.name} has"
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0], "free on the GPU"
    # What this process has taken itself the training will have in its place.
    found = _available() + process_bytes()
    limit = _group_limit()
    return (limit, "the limit of this container") if limit is not None and limit < found else (found, "free here")


def free_disk(folder: Path) -> int:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def baseline_bytes() -> int:
    """Memory that a process has which has loaded all that a training needs, and no model: what this one has now, and
    what it takes when it computes for the first time."""
    for name in _OF_A_TRAINING:
        importlib.import_module(name)
    return process_bytes() + KERNELS


def process_bytes() -> int:
    """Memory that this process has now; where the system does not tell, the most that it had."""
    path = Path("/proc/self/statm")
    if path.exists():
        return int(path.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_bytes()


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _available() -> int:
    facts = Path("/proc/meminfo")
    if facts.exists():
        lines = facts.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_limit() -> int | None:
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        if path.exists() and (text := path.read_text(encoding="ascii").strip()).isdecimal():
            return int(text)
    return None
