"""Directions of hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill_llm.losses.layers import ProjectedLoss

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class Cosine(ProjectedLoss):
    """1 - cosine between hidden states, 0 to 2, as a mean over the pairs of layers.

    Sanh et al. 2019, arXiv:1910.01108, sec. 3. It does not look at how long the states are, so that it suits models
    whose layers differ in scale. Where the widths differ, a head is learned with the student.
    """

    kind: Literal["cosine"] = "cosine"

    def between(
        self, student: Float[Tensor, "M D"], teacher: Float[Tensor, "M D"], rows: Int[Tensor, " M"]
    ) -> Float[Tensor, " M"]:
        from torch.nn.functional import cosine_similarity

        return 1 - cosine_similarity(student, teacher, dim=-1)
