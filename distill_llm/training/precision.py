"""What a training computes in, where the recipe leaves it open."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from distill_llm.models.peers import members_of
from distill_llm.recipe.train import Precision

MIN_PARAMETERS = 500_000
"""Of a student that gains by bfloat16 on a CPU: casts cost smaller ones what products save (docs/log.md)."""


@dataclass(frozen=True, slots=True)
class Computes:
    """``bfloat16`` is autocast: weights, sums and losses stay in float32. ``why`` is for people."""

    bfloat16: bool
    why: str

    @property
    def name(self) -> str:
        return "bfloat16" if self.bfloat16 else "float32"


def choose_precision(asked: Precision, model: nn.Module) -> Computes:
    """A function of the recipe, the machine and the student's size alone.

    Nothing is measured, so that each process, and each resume on this machine, chooses the same.
    """
    if asked != "auto":
        return Computes(asked == "bfloat16", "as the recipe says")
    if torch.cuda.is_available():
        has_it = torch.cuda.is_bf16_supported()
        return Computes(has_it, f"this GPU {'has' if has_it else 'lacks'} bfloat16")
    instructions = _bfloat16_instructions()
    if not instructions:
        return Computes(False, "this CPU has no instructions for bfloat16")
    size = max(sum(weight.numel() for weight in one.parameters()) for one in members_of(model))
    if size < MIN_PARAMETERS:
        return Computes(False, f"{size:,} parameters are too few to gain by {instructions}")
    return Computes(True, f"this CPU has {instructions}")


def _bfloat16_instructions() -> str:
    """Those that multiply bfloat16 faster than float32; empty where the CPU has none, or torch does not say."""
    for name, probe in (("AMX", "_is_amx_tile_supported"), ("AVX-512 BF16", "_is_avx512_bf16_supported")):
        if getattr(torch.cpu, probe, lambda: False)():
            return name
    return ""
