"""Which layer of the student learns from which of the teacher: what all losses on layers share.

M tokens, D and E hidden sizes of student and teacher.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, field_validator

from distill_llm.core.errors import ConfigError
from distill_llm.core.features import Features, Reading, Shape, Side
from distill_llm.losses.base import TermLoss

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

Heads: TypeAlias = "Sequence[Callable[[Tensor], Tensor]]"
Pair: TypeAlias = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class FeatureLoss(TermLoss):
    """A loss between layers of student and teacher, at the same tokens: M tokens in, M values out."""

    layers: Literal["last", "uniform", "lower_half"] | tuple[Pair, ...] = Field(
        default="last",
        description="last: the two last ones; uniform: every layer of the student, its depth in proportion; "
        "lower_half: likewise, up to the student's middle; or pairs [student, teacher], counted from 1, with 0 for the "
        "embeddings",
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _pairs_of_numbers(cls, layers: object) -> object:
        def is_pair(pair: object) -> bool:
            return isinstance(pair, Sequence) and len(pair) == 2 and all(type(layer) is int for layer in pair)

        if isinstance(layers, str) or (isinstance(layers, Sequence) and layers and all(map(is_pair, layers))):
            return layers
        raise ValueError(
            f"{layers!r} names no pairs of layers. Write [[student, teacher], ...], or one of last, uniform, lower_half"
        )

    @property
    @abstractmethod
    def side(self) -> Side:
        """Whose tokens the loss looks at."""

    @property
    @abstractmethod
    def reading(self) -> Reading:
        """What it needs of a forward pass."""

    @abstractmethod
    def __call__(self, student: Features, teacher: Features, heads: Heads = ()) -> Float[Tensor, " M"]:
        """Loss of each token. The teacher's features stand at the same tokens as the student's.

        ``heads`` were made for ``widths``, one for each pair, and bring the student's states to the teacher's width.
        """

    def pairs(self, student: int, teacher: int) -> list[tuple[int, int]]:
        """Pairs of layers, of models with so many."""
        if self.layers == "last":
            return [(student, teacher)]
        if self.layers in ("uniform", "lower_half"):
            highest = student if self.layers == "uniform" else max(1, student // 2)
            return [(layer, max(1, round(layer * teacher / student))) for layer in range(1, highest + 1)]
        return [(int(one), int(other)) for one, other in self.layers]

    def widths(self, student: Shape, teacher: Shape) -> list[tuple[int, int]]:
        """Width of student and teacher for each pair that needs a learned head; none where no head is needed.

        Raises ConfigError where a layer does not exist.
        """
        for one, other in self.pairs(student.layers, teacher.layers):
            if one > student.layers or other > teacher.layers:
                raise ConfigError(
                    f"the loss compares layer {one} of the student with layer {other} of the teacher, but their "
                    f"{self.side}s have {student.layers} and {teacher.layers}. Choose others in `layers`."
                )
        return []


class HiddenLoss(FeatureLoss):
    """A loss between hidden states, as a mean over the pairs of layers."""

    of: Side = Field(
        default="decoder",
        description="decoder: at the places from which supervised tokens are predicted; encoder: at the input's tokens",
    )

    @property
    def side(self) -> Side:
        return self.of

    @property
    def reading(self) -> Reading:
        return Reading(hidden=frozenset({self.of}))

    def __call__(self, student: Features, teacher: Features, heads: Heads = ()) -> Float[Tensor, " M"]:
        import torch

        found = []
        for number, (one, other) in enumerate(self.pairs(len(student.hidden) - 1, len(teacher.hidden) - 1)):
            mine, theirs = student.hidden[one].float(), teacher.hidden[other].detach().float()
            found.append(self.between(heads[number](mine) if heads else mine, theirs, student.rows))
        return torch.stack(found).mean(0)

    @abstractmethod
    def between(
        self, student: Float[Tensor, "M D"], teacher: Float[Tensor, "M E"], rows: Int[Tensor, " M"]
    ) -> Float[Tensor, " M"]:
        """Loss of each token, between one layer of each, in float32; tokens of one row stand together."""


class ProjectedLoss(HiddenLoss):
    """One whose hidden states must be of one width: where they are not, a linear head for each pair is learned with the
    student, as the regressor of Romero et al. 2015, arXiv:1412.6550, sec. 2.2; it is left out of the finished model.
    """

    def widths(self, student: Shape, teacher: Shape) -> list[tuple[int, int]]:
        super().widths(student, teacher)
        if student.width == teacher.width:
            return []
        return [(student.width, teacher.width)] * len(self.pairs(student.layers, teacher.layers))
