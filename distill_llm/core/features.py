"""What a model's layers hold at the tokens of a batch, for losses that look inside.

B rows, M tokens, D hidden size, H attention heads, K positions that a token looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor, device

Side: TypeAlias = Literal["decoder", "encoder"]
"""Whose layers: the decoder's (a decoder-only model is all decoder), at the places from which supervised tokens are
predicted; or the encoder's, at the tokens of the input."""

Look: TypeAlias = Literal["self", "cross", "encoder"]
"""Whose attention: the decoder's on what it wrote, the decoder's on the input, or the encoder's on the input."""

SIDES: Mapping[Look, Side] = {"self": "decoder", "cross": "decoder", "encoder": "encoder"}
"""Whose tokens look."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a forward pass is to give besides logits."""

    hidden: frozenset[Side] = frozenset()
    attention: frozenset[Look] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.hidden or self.attention)

    @property
    def sides(self) -> frozenset[Side]:
        """The sides whose tokens are looked at."""
        looking: frozenset[Side] = frozenset(SIDES[look] for look in self.attention)
        return self.hidden | looking


LOGITS = Reading()
"""Nothing besides."""


def all_of(readings: Iterable[Reading]) -> Reading:
    """Everything that some of ``readings`` wants."""
    parts = list(readings)
    return Reading(
        frozenset(side for part in parts for side in part.hidden),
        frozenset(look for part in parts for look in part.attention),
    )


@dataclass(frozen=True, slots=True)
class Features:
    """One model's layers at M tokens of one side, in the order of the targets, then of the rows.

    ``hidden`` has one entry a layer, the embeddings first; ``attention`` one a layer, with the probabilities of each
    head. ``heads`` are a student's, by the name of the term that they are learned for: they bring its hidden states to
    the teacher's width, one for each pair of layers.
    """

    rows: Int[Tensor, " M"]
    targets: Int[Tensor, " M"]
    hidden: tuple[Float[Tensor, "M D"], ...] = ()
    attention: Mapping[Look, tuple[Float[Tensor, "M H K"], ...]] = field(default_factory=dict)
    agreement: Float[Tensor, " M"] | None = None
    heads: Mapping[str, Sequence[Callable[[Tensor], Tensor]]] = field(default_factory=dict)

    def where(self, keep: Bool[Tensor, " M"]) -> Features:
        """The tokens of ``keep``."""
        return replace(
            self,
            rows=self.rows[keep],
            targets=self.targets[keep],
            hidden=tuple(states[keep] for states in self.hidden),
            attention={look: tuple(maps[keep] for maps in layers) for look, layers in self.attention.items()},
            agreement=None if self.agreement is None else self.agreement[keep],
        )

    def to(self, where: device) -> Features:
        """On another device."""
        return replace(
            self,
            rows=self.rows.to(where),
            targets=self.targets.to(where),
            hidden=tuple(states.to(where) for states in self.hidden),
            attention={look: tuple(maps.to(where) for maps in layers) for look, layers in self.attention.items()},
            agreement=None if self.agreement is None else self.agreement.to(where),
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """How many layers (embeddings not counted) one side of a model has, and their width."""

    layers: int
    width: int
