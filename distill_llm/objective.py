"""The objective: a weighted sum of terms, each a mean over its own tokens. The only place that sums and divides.

B rows, N supervised tokens, K terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from pydantic import Field, model_validator

from distill_llm.core.component import Component, any_of
from distill_llm.core.example import TARGETS, Target
from distill_llm.core.signals import IGNORE_INDEX, Batch, Signals, aligned_labels
from distill_llm.losses.base import Loss

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    AnyLoss: TypeAlias = Loss
else:
    AnyLoss = any_of(Loss, "distill_llm.losses")


class Term(Component):
    """One weighted loss over the tokens of some targets, perhaps against a teacher."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", description="shown in logs; unique in the objective")
    loss: AnyLoss
    targets: tuple[Target, ...] = Field(min_length=1, description="the rows that the term looks at")
    weight: float = Field(default=1.0, gt=0)
    teacher: str | None = Field(default=None, description="one of the recipe's `teachers`; absent for hard labels")

    @model_validator(mode="after")
    def _teacher_fits_loss(self) -> Term:
        kind = type(self.loss).model_fields["kind"].default
        if self.loss.needs_teacher and self.teacher is None:
            raise ValueError(
                f"{kind} compares the student with a teacher, but `teacher` is not set. Name one of the recipe's "
                "`teachers`, or use a loss on hard labels (cross_entropy)"
            )
        if not self.loss.needs_teacher and self.teacher is not None:
            raise ValueError(f"{kind} looks at no teacher, but `teacher: {self.teacher}` is set. Remove it")
        return self

    def owns(self, targets: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Which entries belong to this term."""
        owned = targets == TARGETS.index(self.targets[0])
        for target in self.targets[1:]:
            owned = owned | (targets == TARGETS.index(target))
        return owned


def targets_of(terms: Iterable[Term]) -> tuple[Target, ...]:
    """The targets that some term looks at, in their fixed order."""
    wanted = {target for term in terms for target in term.targets}
    return tuple(target for target in TARGETS if target in wanted)


class Objective:
    """``loss = sum_k weight_k * sum_{n in k} loss_k(n) / count_k``.

    ``count_k`` is the number of tokens of term k over the whole accumulated batch and all ranks, so a label of two
    tokens is not drowned by a rationale of eighty. With terms label and rationale this is the loss of Hsieh et al.
    2023, arXiv:2305.02301, eq. 3, with its two means over tokens.
    """

    def __init__(self, terms: Sequence[Term]):
        self.terms = tuple(terms)

    def counts(self, batch: Batch) -> Int[Tensor, " K"]:
        """Supervised tokens of each term in one batch."""
        import torch

        per_row = (aligned_labels(batch) != IGNORE_INDEX).sum(1)
        return torch.stack([(per_row * term.owns(batch["targets"])).sum() for term in self.terms])

    def rows_for(self, teacher: str, batch: Batch) -> Bool[Tensor, " B"]:
        """The rows about which some term asks this teacher."""
        import torch

        wanted = torch.zeros_like(batch["targets"], dtype=torch.bool)
        for term in self.terms:
            if term.teacher == teacher:
                wanted = wanted | term.owns(batch["targets"])
        return wanted

    def __call__(
        self, student: Signals, teachers: Mapping[str, Signals], counts: Int[Tensor, " K"]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss, and each term's share of its mean. A teacher's signals may cover only the targets it teaches."""
        total = student.logits[:0].float().sum()  # zero: keeps the graph alive when no term has a token here
        means: dict[str, Tensor] = {}
        for term, count in zip(self.terms, counts, strict=True):
            said = student.where(term.owns(student.targets))
            taught = None
            if term.teacher is not None:
                taught = teachers[term.teacher]
                taught = taught.where(term.owns(taught.targets))
            mean = term.loss(said, taught).sum() / count.clamp_min(1)
            total = total + term.weight * mean
            means[term.name] = mean.detach()
        return total, means
