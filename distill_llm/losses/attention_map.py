"""What a token looks at, as the teacher does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill_llm.core.features import SIDES, Look, Reading, Side
from distill_llm.losses.layers import FeatureLoss, Heads

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from distill_llm.core.features import Features

_LEAST = 1e-12  # of a probability: float32 may round it to 0, and its logarithm would be without end


class AttentionMap(FeatureLoss):
    """KL(teacher || student) between the attention probabilities of a token, in nats: a mean over heads and layers.

    Wang et al. 2020 (MiniLM), arXiv:2002.10957, eq. 4, there for the last layer. Where the models have different
    numbers of heads, their means over heads are compared. Both models run with eager attention, which is the one that
    shows its probabilities, and the student without dropout on them.
    """

    kind: Literal["attention_map"] = "attention_map"
    of: Look = Field(
        default="self",
        description="self: a decoder's on what it has read; cross: a decoder's on the input; encoder: an encoder's",
    )

    @property
    def side(self) -> Side:
        return SIDES[self.of]

    @property
    def reading(self) -> Reading:
        return Reading(attention=frozenset({self.of}))

    def __call__(self, student: Features, teacher: Features, heads: Heads = ()) -> Float[Tensor, " M"]:
        import torch

        mine, theirs = student.attention[self.of], teacher.attention[self.of]
        found = []
        for one, other in self.pairs(len(mine), len(theirs)):
            q, p = mine[one - 1].float(), theirs[other - 1].detach().float()
            if q.size(1) != p.size(1):
                q, p = q.mean(1, keepdim=True), p.mean(1, keepdim=True)
            width = min(q.size(-1), p.size(-1))  # beyond it there is only padding, which nobody looks at
            q, p = q[..., :width].clamp_min(_LEAST), p[..., :width].clamp_min(_LEAST)
            found.append((p * (p.log() - q.log())).sum(-1).mean(1))
        return torch.stack(found).mean(0)
