"""What a teacher said of a token when not all of its words were kept: the likeliest ones, or some drawn ones.

N supervised tokens, V vocabulary, K likeliest words, J these and all others as one, R temperatures, S draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

Kept = TypeVar("Kept", bound="SparseSignals")


@dataclass(frozen=True, slots=True)
class SparseSignals:
    """One teacher's words at N supervised tokens, in row order; the rest is as in Signals.

    ``width``: words that the teacher spoke of. ``temperatures``: those at which it can be compared. ``known``: whether
    it says anything of the token, or its words mean nothing; None where it does of all.
    """

    token_ids: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]
    width: int
    temperatures: tuple[float, ...]
    known: Bool[Tensor, " N"] | None = field(default=None, kw_only=True)

    def where(self: Kept, keep: Bool[Tensor, " N"]) -> Kept:
        return self._picked(lambda column: column[keep])

    def of_target(self: Kept, target: int) -> Kept:
        """The tokens of one target (as in the column ``targets``), in row order."""
        return self.where(self.targets == target)

    def part(self: Kept, start: int, stop: int) -> Kept:
        """The tokens from ``start`` on, up to ``stop``."""
        return self._picked(lambda column: column[start:stop])

    def likeliest(self) -> Int[Tensor, " N"]:
        """The teacher's likeliest word at each token."""
        raise NotImplementedError

    def entropy(self) -> Float[Tensor, " N"]:
        """What is known of the teacher's entropy, in nats."""
        raise NotImplementedError

    def captured_mass(self) -> Float[Tensor, " N"] | None:
        """The probability, at temperature 1, of the words that were kept; None where that says nothing."""
        return None

    def _picked(self: Kept, pick: Callable[[Tensor], Tensor]) -> Kept:
        from torch import Tensor

        columns = {own.name: getattr(self, own.name) for own in fields(self)}
        return replace(self, **{name: pick(value) for name, value in columns.items() if isinstance(value, Tensor)})

    def _number_of(self, temperature: float) -> int:
        assert temperature in self.temperatures, f"{temperature} is not one of {self.temperatures}"
        return self.temperatures.index(temperature)


@dataclass(frozen=True, slots=True)
class TopSignals(SparseSignals):
    """The K likeliest words, likeliest first, and how much all others hold together, at each of the temperatures.

    ``log_probs`` are at temperature 1. ``log_odds``: log(mass of the others / mass of the K), -inf where there are no
    others.
    """

    word_ids: Int[Tensor, "N K"]
    log_probs: Float[Tensor, "N K"]
    log_odds: Float[Tensor, "N R"]

    def log_coarse(self, temperature: float) -> Float[Tensor, "N J"]:
        """Log-probabilities of the K words and, last, of all others as one; they sum to 1 without being renormalised.

        The mass of the K words is the teacher's own: what softening moves to the others is in ``log_odds``.
        """
        import torch
        from torch.nn.functional import softplus

        odds = self.log_odds[:, self._number_of(temperature), None]
        log_top = -softplus(odds)
        return torch.cat([(self.log_probs / temperature).log_softmax(-1) + log_top, odds + log_top], -1)

    def log_coarse_of(self, logits: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N J"]:
        """The same of another model, which has these ``logits``: at the same K words, and all others as one.

        The others are summed by themselves: 1 minus the K words would lose what is small.
        """
        from distill_llm.core.word_sums import coarse_logits

        return coarse_logits(logits, self.word_ids, temperature).log_softmax(-1)

    def likeliest(self) -> Int[Tensor, " N"]:
        return self.word_ids[:, 0]

    def entropy(self) -> Float[Tensor, " N"]:
        """Of the K words, and all others as one, at temperature 1: no more than the teacher's own."""
        import torch

        top = self.log_probs.exp()
        return torch.special.entr(top).sum(-1) + torch.special.entr((1 - top.sum(-1)).clamp_min(0))

    def captured_mass(self) -> Float[Tensor, " N"] | None:
        return self.log_probs.exp().sum(-1)


@dataclass(frozen=True, slots=True)
class SampledSignals(SparseSignals):
    """Words drawn from the teacher's distribution at each of the temperatures, and its entropies there, in nats."""

    word_ids: Int[Tensor, "N R S"]
    entropies: Float[Tensor, "N R"]
    best: Int[Tensor, " N"]

    def drawn(self, temperature: float) -> tuple[Int[Tensor, "N S"], Float[Tensor, " N"]]:
        """The draws at ``temperature``, and the entropy of what they were drawn from."""
        number = self._number_of(temperature)
        return self.word_ids[:, number], self.entropies[:, number]

    def likeliest(self) -> Int[Tensor, " N"]:
        return self.best

    def entropy(self) -> Float[Tensor, " N"]:
        """At the first of the temperatures."""
        return self.entropies[:, 0]
