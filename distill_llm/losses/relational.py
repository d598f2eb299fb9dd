"""How far apart the tokens of a row are, in the eyes of each model.

R rows, L tokens of the longest of them, M tokens in all, D and E hidden sizes of student and
teacher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill_llm.losses.layers import HiddenLoss

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

_LEAST = 1e-8


class Relational(HiddenLoss):
    """Huber loss between relations of a token's hidden state to those of the other tokens of its row.

    Park et al. 2019, arXiv:1904.05068. ``distance`` (eq. 4-6): distances to the others, over their mean in the row;
    ``angle`` (eq. 7-9): cosines of the angles that a token sees between any two others. Relations do not ask for equal
    widths, so nothing is learned besides the student. There the examples of a batch are related, here the tokens of a
    row: what a row adds does not depend on the rows beside it. A row of one token (of two, for angles) adds 0.
    """

    kind: Literal["relational"] = "relational"
    relation: Literal["distance", "angle"] = Field(
        default="distance", description="angle: takes memory with the cube of a row's tokens"
    )

    def between(
        self, student: Float[Tensor, "M D"], teacher: Float[Tensor, "M E"], rows: Int[Tensor, " M"]
    ) -> Float[Tensor, " M"]:
        if not len(rows):
            return student.sum(-1)
        group, column = _place(rows)
        there = _spread(student.new_ones(len(rows), 1), group, column)[..., 0] > 0
        of = _distances if self.relation == "distance" else _angles
        return of(_spread(student, group, column), _spread(teacher, group, column), there)[group, column]


def _place(rows: Int[Tensor, " M"]) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"]]:
    """Each token's group, which are the rows in their order, and its place in it."""
    import torch

    _, group, counts = torch.unique_consecutive(rows, return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    return group, torch.arange(len(rows), device=rows.device) - first[group]


def _spread(
    states: Float[Tensor, "M D"], group: Int[Tensor, " M"], column: Int[Tensor, " M"]
) -> Float[Tensor, "R L D"]:
    shape = int(group.max()) + 1, int(column.max()) + 1, states.size(-1)
    return states.new_zeros(shape).index_put((group, column), states)


def _distances(
    mine: Float[Tensor, "R L D"], theirs: Float[Tensor, "R L E"], there: Bool[Tensor, "R L"]
) -> Float[Tensor, "R L"]:
    import torch
    from torch.nn.functional import smooth_l1_loss

    others = there[:, :, None] & there[:, None, :] & ~torch.eye(there.size(1), dtype=torch.bool, device=there.device)
    count = others.sum((1, 2), keepdim=True).clamp_min(1)

    def relative(states: Tensor) -> Tensor:
        far = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") * others
        return far / (far.sum((1, 2), keepdim=True) / count).clamp_min(_LEAST)

    gaps = smooth_l1_loss(relative(mine), relative(theirs), reduction="none") * others
    return gaps.sum(-1) / others.sum(-1).clamp_min(1)


def _angles(
    mine: Float[Tensor, "R L D"], theirs: Float[Tensor, "R L E"], there: Bool[Tensor, "R L"]
) -> Float[Tensor, "R L"]:
    import torch
    from torch.nn.functional import normalize, smooth_l1_loss

    length = there.size(1)
    apart = ~torch.eye(length, dtype=torch.bool, device=there.device)
    three = apart[:, :, None] & apart[:, None, :] & apart[None]  # from a token, to one other, to yet another
    found = []
    for one, other, here in zip(mine, theirs, there, strict=True):  # row by row: L^3 numbers each
        used = three & here[:, None, None] & here[None, :, None] & here[None, None, :]
        cosines = []
        for states in (one, other):
            ways = normalize(states[None] - states[:, None], dim=-1, eps=_LEAST)
            cosines.append(ways @ ways.transpose(1, 2))
        gaps = smooth_l1_loss(*cosines, reduction="none") * used
        found.append(gaps.sum((1, 2)) / used.sum((1, 2)).clamp_min(1))
    return torch.stack(found)
