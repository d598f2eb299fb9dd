"""Several of the recipe's teachers as one.

N supervised tokens, M of them, V vocabulary, D hidden size (of all members together), K members.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from distill_llm.core.signals import Batch, LazySignals, Signals
from distill_llm.teachers.base import LazyTeacher, TensorTeacher, TensorTeacherSpec
from distill_llm.teachers.student import StudentFacts

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor, dtype

    from distill_llm.core.sparse import SparseSignals

Mean: TypeAlias = Literal["probabilities", "logits"]
By: TypeAlias = Literal["fixed", "confidence"]
Mix: TypeAlias = "Callable[[Sequence[Tensor]], Tensor]"
Part: TypeAlias = "tuple[Callable[[Tensor], Tensor], int, dtype]"


class EnsembleTeacher:
    """``weights`` are one for each member, above 0; ``width``: words that all members speak of."""

    def __init__(self, members: Sequence[TensorTeacher], weights: Sequence[float], *, mean: Mean, by: By, width: int):
        self._members, self._width = tuple(members), width
        self._mix: Mix = partial(mixed, weights=tuple(weights), mean=mean, by=by)

    def signals(self, batch: Batch) -> Signals:
        said = [_all_words(member.signals(batch)).narrowed(self._width) for member in self._members]
        return replace(said[0], logits=self._mix([one.logits for one in said]), known=_known_to_all(said))

    def lazy_signals(self, batch: Batch) -> LazySignals:
        """The members' hidden states side by side; each chunk of them goes back to the heads that they came from.

        Where a member's logits cannot wait, they stand in place of its hidden states.
        """
        import torch

        said = [lazily(member, batch) for member in self._members]
        parts = [(one.make_logits, one.hidden.size(-1), one.hidden.dtype) for one in said]
        hidden = torch.cat([one.hidden for one in said], -1)  # in a type that holds each of theirs without a loss
        make_logits = partial(self._chunk, parts)
        return replace(said[0], hidden=hidden, make_logits=make_logits, weights=(), known=_known_to_all(said))

    def _chunk(self, parts: Sequence[Part], hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
        pieces = hidden.split([size for _, size, _ in parts], -1)
        logits = [make(piece.to(dtype)) for (make, _, dtype), piece in zip(parts, pieces, strict=True)]
        return self._mix([one[:, : self._width] for one in logits])


def mixed(
    logits: Sequence[Float[Tensor, "N V"]], *, weights: Sequence[float], mean: Mean, by: By
) -> Float[Tensor, "N V"]:
    """The log-probabilities (float32) of a weighted mean of K models; the logits of one alone, to the bit.

    ``mean``: the arithmetic mean of their probabilities, log sum_k w_k p_k; or the geometric one, sum_k w_k log p_k
    and normalized, which is the mean of their logits. Hinton et al. 2015, arXiv:1503.02531, sec. 1, names both; the
    first is that of You et al. 2017 (KDD, "Learning from Multiple Teacher Networks"), who soften each teacher before
    the mean, where here a loss's temperature softens the mean. ``by``: w_k is the share of ``weights``; by confidence
    it is that times exp(-entropy of p_k), token by token, and normalized, which is our own choice.
    """
    import torch

    if len(logits) == 1:
        return logits[0].float()
    each = [one.float().log_softmax(-1) for one in logits]
    shares = torch.tensor(weights, device=each[0].device).log().expand(len(each[0]), len(each))
    if by == "confidence":
        shares = shares - torch.stack([torch.special.entr(one.exp()).sum(-1) for one in each], -1)
    shares = shares.log_softmax(-1)
    total = torch.zeros_like(each[0])
    if mean == "logits":
        for one, share in zip(each, shares.exp().unbind(-1), strict=True):
            total = total + share[:, None] * one
        return total.log_softmax(-1)
    total = total - torch.inf
    for one, share in zip(each, shares.unbind(-1), strict=True):
        total = torch.logaddexp(total, one + share[:, None])
    return total


def lazily(member: TensorTeacher, batch: Batch) -> LazySignals:
    """A teacher's lazy signals; where its logits cannot wait, they stand in place of its hidden states."""
    if isinstance(member, LazyTeacher):
        return member.lazy_signals(batch)
    from distill_llm.core.signals import tokens_of

    said = _all_words(member.signals(batch))
    by_target = said.targets.argsort(stable=True)  # the order of lazy tokens
    return LazySignals(
        tokens=tokens_of(batch),
        hidden=said.logits[by_target],
        make_logits=_as_it_is,
        weights=(),
        anchor=said.logits[:0].float().sum(),
        chunk_tokens=max(1, len(by_target)),
        known=None if said.known is None else said.known[by_target],
    )


def _all_words(said: Signals | SparseSignals) -> Signals:
    assert isinstance(said, Signals), "a recipe with such a member is refused"
    return said


def _known_to_all(said: Sequence[Signals | LazySignals]) -> Bool[Tensor, " N"] | None:
    import torch

    known = [one.known for one in said if one.known is not None]
    return torch.stack(known).all(0) if known else None


def _as_it_is(logits: Float[Tensor, "M V"]) -> Float[Tensor, "M V"]:
    return logits


class Ensemble(TensorTeacherSpec):
    """Other teachers of the recipe, run one after the other and mixed token by token; each is opened once."""

    kind: Literal["ensemble"] = "ensemble"
    has_layers: ClassVar[bool] = False
    of: tuple[str, ...] = Field(min_length=2, description="names of other teachers of the recipe")
    weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        default=(), description="one for each of `of`, in any unit; empty: all alike"
    )
    mean: Mean = Field(default="probabilities", description="logits: the geometric mean of the probabilities")
    by: By = Field(default="fixed", description="confidence: times exp(-entropy) of the member, token by token")
    drop_failing: bool = Field(
        default=False, description="go on with the others where one of `of` cannot be had; a warning says so"
    )

    @field_validator("of")
    @classmethod
    def _names_differ(cls, of: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(of)) < len(of):
            raise ValueError(f"a teacher is named twice: {list(of)}. Name it once, and give it more weight")
        return of

    @model_validator(mode="after")
    def _one_weight_each(self) -> Ensemble:
        if self.weights and len(self.weights) != len(self.of):
            raise ValueError(
                f"`weights` has {len(self.weights)} numbers for {len(self.of)} teachers {list(self.of)}. Give one for "
                "each, or none"
            )
        return self

    def members(self) -> tuple[str, ...]:
        return self.of

    def may_lack(self, name: str) -> bool:
        return self.drop_failing and name in self.of

    def without(self, names: Collection[str]) -> TensorTeacherSpec:
        """Those that are left keep their weights, which are shares of what is there."""
        left = [place for place, name in enumerate(self.of) if name not in names]
        weights = tuple(self.weights[place] for place in left) if self.weights else ()
        return self.model_copy(update={"of": tuple(self.of[place] for place in left), "weights": weights})

    def check_others(self, others: Mapping[str, TensorTeacherSpec]) -> None:
        super().check_others(others)
        for name in self.of:
            if not others[name].gives_logits:
                raise ValueError(
                    f"{name} keeps some words of each token only, and cannot be mixed with others. "
                    f"{others[name].instead_of_mixing}"
                )

    def open(self, student: StudentFacts, members: Sequence[TensorTeacher] = ()) -> TensorTeacher:
        assert len(members) == len(self.of), "each of `of` is opened first"
        weights = self.weights or (1.0,) * len(self.of)
        return EnsembleTeacher(members, weights, mean=self.mean, by=self.by, width=student.width)

    def num_parameters(self, student_parameters: int) -> int:
        return 0
