"""The contract of a loss: N supervised tokens in, N values out. No mask, no mean, no weight."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, field_validator

from distill_llm.core.component import Component
from distill_llm.core.schedule import Schedule, number_at
from distill_llm.core.sparse import SparseSignals, TopSignals

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from distill_llm.core.signals import Signals


class TermLoss(Component):
    """What a term weighs: a loss on logits (``Loss``), or on layers (``FeatureLoss``)."""

    needs_teacher: ClassVar[bool] = True
    any_tokenizer: ClassVar[bool] = False
    """It compares no word with a word: the tokenizers of teacher and student may have nothing in common."""
    takes: ClassVar[frozenset[str]] = frozenset()
    """Payloads of cached signals that it can be computed from, where these do not give all logits."""

    def at(self, progress: float) -> TermLoss:
        """With its schedules at their values when a share ``progress`` (0..1) of the training is done."""
        now = {name: number_at(value, progress) for name, value in self if isinstance(value, Schedule)}
        return self.model_copy(update=now) if now else self


class Loss(TermLoss):
    """A loss on what models say of the next token."""

    @abstractmethod
    def __call__(self, student: Signals, teacher: Signals | None) -> Float[Tensor, " N"]:
        """Loss of each token, in nats. The teacher's signals stand at the same tokens as the student's."""

    def of_sparse(self, student: Signals, teacher: SparseSignals) -> Float[Tensor, " N"]:
        """The same beside a teacher of whose words only some were kept, for the payloads in ``takes``.

        The student's signals are over the words that the teacher spoke of.
        """
        raise NotImplementedError(f"a recipe with {type(self).__name__} and such a teacher is refused")


class Divergence(Loss):
    """A loss between the distributions of teacher and student, both softened by ``temperature``.

    The factor temperature^2 keeps the size of the gradient when the temperature changes (Hinton et al. 2015,
    arXiv:1503.02531, sec. 2). The teacher gets no gradient. Zero where both agree, never negative.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"top_k"})
    order: ClassVar[int] = 2
    """The power of the difference in logits that it grows with where both nearly agree; also that of the factor."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Schedule = Field(
        default=1.0, description="softens both distributions; a number, or a schedule"
    )

    @field_validator("temperature")
    @classmethod
    def _above_zero(cls, temperature: float | Schedule) -> float | Schedule:
        if isinstance(temperature, Schedule) and min(temperature.start, temperature.end) <= 0:
            raise ValueError(
                f"a temperature must stay above 0, and this schedule goes from {temperature.start:g} to "
                f"{temperature.end:g}. Let it end at 1, say"
            )
        return temperature

    def __call__(self, student: Signals, teacher: Signals | None) -> Float[Tensor, " N"]:
        assert teacher is not None
        temperature = self.constant_temperature
        log_p = (teacher.logits.detach().float() / temperature).log_softmax(-1)
        log_q = (student.logits.float() / temperature).log_softmax(-1)
        return temperature**self.order * self.between(log_p, log_q)

    def of_sparse(self, student: Signals, teacher: SparseSignals) -> Float[Tensor, " N"]:
        """Over the teacher's likeliest words, and all others as one: never more than over all words."""
        assert isinstance(teacher, TopSignals), "other payloads are not in `takes`"
        temperature = self.constant_temperature
        log_p, log_q = teacher.log_coarse(temperature), teacher.log_coarse_of(student.logits, temperature)
        return temperature**self.order * self.between(log_p, log_q)

    @property
    def constant_temperature(self) -> float:
        assert not isinstance(self.temperature, Schedule), "a schedule is a number only `at` some progress"
        return self.temperature

    @abstractmethod
    def between(self, log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """The divergence of each token; ``log_p`` is the teacher's, ``log_q`` the student's. -inf is probability 0."""


def relative_entropy(log_a: Float[Tensor, "N V"], log_b: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(a || b), nats; a word of probability 0 under ``a`` costs nothing, whatever ``b`` thinks of it."""
    a = log_a.exp()
    # By probability, not by -inf: one too small for float32 times a logarithm of -inf would be NaN.
    return (a * (log_a - log_b).masked_fill(a == 0, 0.0)).sum(-1)


def log_mixture(log_a: Float[Tensor, "N V"], log_b: Float[Tensor, "N V"], share_of_a: float) -> Float[Tensor, "N V"]:
    """log(share * a + (1 - share) * b), with no overflow; ``share_of_a`` is between 0 and 1, neither of them."""
    import math

    import torch

    never = (log_a == float("-inf")) & (log_b == float("-inf"))
    # Where both are -inf the gradient of logaddexp is NaN, and stays NaN when it is multiplied by nothing.
    a, b = log_a.masked_fill(never, 0.0), log_b.masked_fill(never, 0.0)
    mixed = torch.logaddexp(a + math.log(share_of_a), b + math.log1p(-share_of_a))
    return mixed.masked_fill(never, float("-inf"))
