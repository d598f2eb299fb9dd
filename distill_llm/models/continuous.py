"""Continuous batching: a prompt takes the place of each one that ends, through transformers' own manager."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from distill_llm.core.errors import TeacherError

Item = TypeVar("Item")

IN_FLIGHT = 2048  # prompts that wait inside the manager; it needs a supply, and memory must not grow with the data
_WAIT_SECONDS = 1.0
_CPU_BLOCKS, _CPU_BATCH_TOKENS = 256, 1024  # without a GPU nothing tells how much memory it may take


def generate_continuously(
    model: Any, prompts: Iterable[tuple[Item, Sequence[int]]], *, ends: Sequence[int], pad: int, max_new_tokens: int
) -> Iterator[tuple[Item, int, list[int] | str]]:
    """Greedy: for each item, the length of its prompt and the new token ids, or why there are none; in any order."""
    attention = model.config._attn_implementation
    manager = _manager(model, ends, pad, max_new_tokens)
    source = iter(prompts)
    waiting: dict[str, tuple[Item, int]] = {}
    if model.device.type == "cuda":
        manager.warmup()
    manager.start()
    try:
        while True:
            for item, ids in itertools.islice(source, IN_FLIGHT - len(waiting)):
                key = manager.add_request(list(ids), max_new_tokens=max_new_tokens)
                waiting[_alive(manager, key)] = (item, len(ids))
            if not waiting:
                return
            result = manager.get_result(timeout=_WAIT_SECONDS)
            if result is None:
                _alive(manager, "running")
            elif result.is_finished() or result.error is not None:
                item, length = waiting.pop(result.request_id)
                yield item, length, str(result.error) if result.error is not None else list(result.generated_tokens)
    finally:
        # All that was asked for is here, or nobody wants the rest.
        manager.stop(block=True, hard_stop=True)
        manager.destroy()
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


def _alive(manager: Any, key: str | None) -> str:
    if key is None or not manager.is_running():
        raise TeacherError(
            "rationales.teacher: continuous batching ended by itself; the log above says why. Set `batching: static` "
            "in rationales.teacher, and report it if the model should be able to."
        )
    return key


def _manager(model: Any, ends: Sequence[int], pad: int, max_new_tokens: int) -> Any:
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(ends) or -1, pad_token_id=pad
    )
    room: dict[str, Any] = {}
    if model.device.type != "cuda":
        room = {"num_blocks": _CPU_BLOCKS, "max_batch_tokens": _CPU_BATCH_TOKENS}
    batching = ContinuousBatchingConfig(**room)
    if model.dtype not in (torch.float16, torch.bfloat16):  # flash attention computes in half precision only
        if hasattr(batching, "auto_switch_to_flash"):
            batching.auto_switch_to_flash = False
        else:  # older versions leave an attention alone that is paged already
            model.set_attn_implementation(f"paged|{model.config._attn_implementation}")
    return model.init_continuous_batching(generation_config=generation, continuous_batching_config=batching)
