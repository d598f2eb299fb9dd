"""Hidden states of the teacher as hints for the student's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distill_llm.losses.layers import ProjectedLoss

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class Hint(ProjectedLoss):
    """Mean squared difference of hidden states, over the teacher's width and the pairs of layers.

    Romero et al. 2015, arXiv:1412.6550, eq. 3, with a mean over the width in place of half the sum: a weight that suits
    one width suits another. Where the widths differ, a head is learned with the student.
    """

    kind: Literal["hint"] = "hint"

    def between(
        self, student: Float[Tensor, "M D"], teacher: Float[Tensor, "M D"], rows: Int[Tensor, " M"]
    ) -> Float[Tensor, " M"]:
        return (student - teacher).square().mean(-1)
