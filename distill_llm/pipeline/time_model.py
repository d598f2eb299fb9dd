"""How long a machine takes for work: this one, measured in seconds, or a GPU by its data sheet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from distill_llm.pipeline.memory_model import Work

UTILISATION = 0.4
"""Of the peak of a data sheet that a training reaches: large ones report between a fifth and a half (Chowdhery et al.
2022, arXiv:2204.02311, table 3)."""
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Machine:
    """``flops`` and ``flops_bfloat16`` are a second's, in matrix products; ``moved`` bytes a second; ``call``: seconds
    that an operation takes whatever there is to compute. ``memory`` is None where the machine itself is asked.
    ``why`` is for people."""

    name: str
    flops: float
    flops_bfloat16: float
    moved: float
    call: float
    why: str
    memory: int | None = None

    def seconds(self, work: Work, *, bfloat16: bool) -> float:
        flops = self.flops_bfloat16 if bfloat16 else self.flops
        return work.flops / flops + work.moved / self.moved + work.calls * self.call


@dataclass(frozen=True, slots=True)
class _Sheet:
    """Dense TFLOPS of tensor cores (bfloat16, or float16 where it has none) and of float32 beside them; GB/s; GiB."""

    half: float
    single: float
    moved: float
    memory: int
    has_bfloat16: bool = True


_SHEETS = {
    # NVIDIA's data sheets: A100 80GB SXM, H100 SXM5, GeForce RTX 4090 (Ada white paper, float32 accumulation), T4, L4
    "a100": _Sheet(312, 19.5, 2039, 80),
    "h100": _Sheet(989, 67, 3350, 80),
    "4090": _Sheet(165, 82.6, 1008, 24),
    "t4": _Sheet(65, 8.1, 320, 16, has_bfloat16=False),
    "l4": _Sheet(121, 30.3, 300, 24),
}
DEVICES = tuple(_SHEETS)
_CALL_ON_GPU = 10e-6  # from Python to a kernel's end, where kernels are short: an assumption


def of_sheet(name: str) -> Machine:
    """A GPU by name, at ``UTILISATION`` of its data sheet."""
    sheet = _SHEETS[name]
    half = sheet.half if sheet.has_bfloat16 else sheet.single
    return Machine(
        name=name,
        flops=UTILISATION * sheet.single * 1e12,
        flops_bfloat16=UTILISATION * half * 1e12,
        moved=UTILISATION * sheet.moved * 1e9,
        call=_CALL_ON_GPU,
        why=f"{UTILISATION:.0%} of its data sheet is assumed, nothing was measured",
        memory=sheet.memory * _GIB,
    )


def measured(device: str) -> Machine:
    """This machine, or its GPU: matrix products, sums, and steps of a very small model, about two seconds of them."""
    import torch

    def product(dtype: torch.dtype, size: int) -> float:
        one, other = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        return 2 * size**3 / _fastest(lambda: one @ other, device)

    size = 512 if device == "cpu" else 4096
    much = torch.ones((1 << 22) if device == "cpu" else (1 << 26), device=device)
    added = torch.empty_like(much)
    return Machine(
        name=torch.cuda.get_device_name() if device == "cuda" else "this CPU",
        flops=product(torch.float32, size),
        flops_bfloat16=product(torch.bfloat16, size),
        moved=3 * 4 * much.numel() / _fastest(lambda: torch.add(much, much, out=added), device),
        call=_small_step(device),
        why=f"measured now, with {torch.get_num_threads()} threads" if device == "cpu" else "measured now",
    )


def _small_step(device: str) -> float:
    """Seconds of an operation where there is next to nothing to compute, all that Python does around it included."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from distill_llm.models.dry_run import dry

    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 4}
    sizes |= {"vocab_size": 32, "decoder_start_token_id": 0}
    config = T5Config(**sizes)

    def step(model: Any, where: str) -> None:
        ids = torch.ones(2, 4, dtype=torch.long, device=where)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    with dry() as run:
        model = T5ForConditionalGeneration(config)
        run.restart()
        step(model, "cpu")
        calls = run.calls
    model = T5ForConditionalGeneration(config)
    cast(Any, model).to(device)
    return _fastest(lambda: step(model, device), device) / calls


def _fastest(work: Callable[[], object], device: str, *, seconds: float = 0.4) -> float:
    """Seconds of the fastest of the runs that fit ``seconds``: others share the machine."""
    import torch

    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found)
