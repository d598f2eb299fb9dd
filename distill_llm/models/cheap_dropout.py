"""Dropout for training on a CPU, where torch draws a mask one number after the other: a quarter of a small T5's step.

Here 64 random bits, which cost torch as much as one number, decide about four. The probability is kept to 1/65,536, its
inverse scales what is left, and the bits are from torch's generator: a seed, a resume, a layer that is computed anew
give the same masks again. They are other masks than torch's. Imports torch at the top: import it inside functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

_LEVELS = 1 << 16


class CheapDropout(nn.Dropout):
    """``nn.Dropout`` with cheap masks on a CPU."""

    def forward(self, input: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """``input``, its entries dropped or scaled while the module is trained."""
        if not self.training or input.device.type != "cpu" or not can_draw(self.p):
            return super().forward(input)
        noise = draw_noise(input.shape, self.p, input.dtype)
        return input.mul_(noise) if self.inplace else input * noise


def draw_noise(shape: Sequence[int], probability: float | int, dtype: torch.dtype) -> Float[Tensor, "..."]:
    """Factors of dropout, drawn from torch's generator: 0 with ``probability``, else the inverse of what is left."""
    size, kept = torch.Size(shape).numel(), _kept(probability)
    bits = torch.empty((size + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:size]
    # Into the wanted type at once: each product with a mask of booleans would have to cast it.
    noise = torch.lt(bits, kept - _LEVELS // 2, out=torch.empty(size, dtype=dtype))
    return noise.mul_(_LEVELS / kept).view(shape)


def can_draw(probability: float | int) -> bool:
    """Whether something is dropped and something is left, at the resolution of the bits."""
    return 0 < _kept(probability) < _LEVELS


def _kept(probability: float | int) -> int:
    return round((1 - probability) * _LEVELS)
