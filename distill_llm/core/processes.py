"""Several processes, as torchrun starts them: who does what, and sums over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from distill_llm.training.arguments import is_main_process, world_size

T = TypeVar("T")


def my_share(items: Sequence[T]) -> Sequence[T]:
    """Every so-manieth item, from this process's own place on."""
    import os

    return items[int(os.environ.get("RANK", "0")) :: world_size()]


def summed(*numbers: int) -> tuple[int, ...]:
    """Sums over all processes."""
    if world_size() == 1:
        return numbers
    import torch
    from torch import distributed

    total = torch.tensor(numbers, device=_state().device)
    distributed.all_reduce(total)
    return tuple(total.tolist())


def main_first(work: Callable[[], None]) -> None:
    """Runs ``work`` in the main process alone; the others wait until it is done."""
    if world_size() == 1:
        work()
        return
    state = _state()
    if is_main_process():
        work()
    state.wait_for_everyone()


def _state() -> Any:
    """The group of all processes. Without being told of the CPU, accelerate makes none there, and waits for nobody."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())
