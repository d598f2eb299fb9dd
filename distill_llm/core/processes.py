"""Several processes, as torchrun starts them: who does what, and sums over all of them."""

from __future__ import annotations

import atexit
import datetime
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    return rank() == 0


def my_share(items: Sequence[T]) -> Sequence[T]:
    """Every so-manieth item, from this process's own place on."""
    return items[rank() :: world_size()]


def summed(*numbers: int) -> tuple[int, ...]:
    """Sums over all processes."""
    if world_size() == 1:
        return numbers
    import torch
    from torch import distributed

    total = torch.tensor(numbers, device=_state().device)
    distributed.all_reduce(total)
    return tuple(total.tolist())


def main_first(work: Callable[[], None], *, patience: datetime.timedelta | None = None) -> None:
    """Runs ``work`` in the main process alone; the others wait until it is done, all for each other before.

    ``patience`` is how long the first call of a program lets them wait, where the backend's minutes are too short.
    """
    if world_size() == 1:
        work()
        return
    state = _state(patience)
    state.wait_for_everyone()
    if is_main_process():
        work()
    state.wait_for_everyone()


def _state(patience: datetime.timedelta | None = None) -> Any:
    """The group of all processes. Without being told of the CPU, accelerate makes none there, and waits for nobody."""
    import torch
    from accelerate import PartialState

    leave_in_time()
    return PartialState(cpu=not torch.cuda.is_available(), **({"timeout": patience} if patience else {}))


@functools.cache
def leave_in_time() -> None:
    """Leaves the group before Python takes itself apart.

    Gloo's threads may still hold a tensor then; to let go of it they need the interpreter, and abort without one: on a
    busy machine one in three programs, all work done and saved, ended with exit code -6.
    """
    atexit.register(_leave)


def _leave() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
        _let_go()


def _let_go(patience: float = 5.0) -> None:
    """Waits, ``patience`` seconds at most, until gloo's threads have nothing in hand.

    Leaving ends them only where nothing refers to the group any more; FSDP does, from C++. While this thread sleeps
    they can have the interpreter, so one that sleeps too, twice in a row, waits for work and not for us.
    """
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():  # not Linux
        time.sleep(0.2)
        return
    quiet, end = 0, time.monotonic() + patience
    while quiet < 2 and time.monotonic() < end:
        time.sleep(0.01)
        stats = [_stat(task) for task in tasks.iterdir()]
        quiet = 0 if any("gloo_runloop" in name and state != "S" for name, state in stats) else quiet + 1


def _stat(task: Path) -> tuple[str, str]:
    """A thread's name, and ``S`` if it sleeps."""
    try:
        name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
    except OSError:  # it has just ended
        return "", ""
    return name, rest.split()[0]
