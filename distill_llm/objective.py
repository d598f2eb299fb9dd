"""The objective: a weighted sum of terms, each a mean over its own tokens. The only place that sums and divides.

B rows, N supervised tokens, K terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from distill_llm.core.component import Component, any_of
from distill_llm.core.example import TARGETS, Target
from distill_llm.core.schedule import Schedule, number_at
from distill_llm.core.signals import (
    IGNORE_INDEX,
    Batch,
    LazySignals,
    Signals,
    TargetSignals,
    aligned_labels,
)
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
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Schedule = Field(
        default=1.0, description="a number, or a schedule"
    )
    until: float = Field(
        default=1.0, gt=0, le=1, description="the share of the training's steps after which the term is dropped"
    )
    row_weight: Literal["equal", "agreement"] = Field(
        default="equal", description="agreement: a row counts as much as the teacher's votes on it agreed"
    )
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

    def at(self, progress: float) -> Term:
        """With its schedules at their values when a share ``progress`` (0..1) of the training is done."""
        return self.model_copy(update={"weight": number_at(self.weight, progress), "loss": self.loss.at(progress)})

    def of_each(self, student: Signals, teacher: Signals | None) -> Float[Tensor, " N"]:
        """The loss of each of the term's tokens, times what its row counts."""
        if teacher is not None and not self.loss.any_tokenizer:
            width = teacher.logits.size(-1)
            student, teacher = student.narrowed(width), teacher.narrowed(width)
        losses = self.loss(student, teacher)
        if teacher is not None and teacher.known is not None:
            losses = losses * teacher.known
        if self.row_weight == "equal" or student.agreement is None:
            return losses
        return losses * student.agreement

    def mean_of(
        self, student: Signals, teacher: Signals | None, count: Int[Tensor, ""]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """What these tokens, of ``count`` in all, add to the loss; and to the term's mean, without a gradient."""
        weight = self.weight
        assert not isinstance(weight, Schedule), "a schedule is a number only `at` some progress"
        mean = self.of_each(student, teacher).sum() / count.clamp_min(1)
        return weight * mean, mean.detach()

    def owns(self, targets: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Which entries belong to this term."""
        owned = targets == TARGETS.index(self.targets[0])
        for target in self.targets[1:]:
            owned = owned | (targets == TARGETS.index(target))
        return owned


Watch = Callable[[Term, Signals, "Signals | None", "Tensor"], None]
"""Looks on while a loss is made: a term, what student and teacher say of some of its tokens, and what these add to the
loss, with its graph."""


def targets_of(terms: Iterable[Term]) -> tuple[Target, ...]:
    """The targets that some term looks at, in their fixed order."""
    wanted = {target for term in terms for target in term.targets}
    return tuple(target for target in TARGETS if target in wanted)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Tokens of one target, from ``start`` to ``stop`` among all; ``first`` counts from the target's first token.

    ``terms`` are the indices of those that own the target, ``teachers`` what theirs say of all its tokens.
    """

    start: int
    stop: int
    first: int
    terms: tuple[int, ...]
    teachers: Mapping[str, Signals | TargetSignals]


class Objective:
    """``loss = sum_k weight_k * sum_{n in k} loss_k(n) / count_k``.

    ``count_k`` is the number of tokens of term k over the whole accumulated batch and all ranks, so a label of two
    tokens is not drowned by a rationale of eighty. With terms label and rationale this is the loss of Hsieh et al.
    2023, arXiv:2305.02301, eq. 3, with its two means over tokens. Row weights multiply losses, not counts: what a row
    adds does not depend on the weights of others.
    """

    def __init__(self, terms: Sequence[Term]):
        self.terms = tuple(terms)

    def at(self, progress: float) -> Objective:
        """The objective when a share ``progress`` (0..1) of the training is done: without terms that have ended."""
        return Objective([term.at(progress) for term in self.terms if progress < term.until])

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

    def asks(self, teacher: str) -> frozenset[int]:
        """The targets (index into TARGETS) about which some term asks this teacher."""
        return frozenset(
            TARGETS.index(target) for term in self.terms if term.teacher == teacher for target in term.targets
        )

    def __call__(
        self,
        student: Signals | LazySignals,
        teachers: Mapping[str, Signals | LazySignals],
        counts: Int[Tensor, " K"],
        watch: Watch | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss, and each term's share of its mean. A teacher's signals may cover only the targets it teaches.

        A student's lazy signals are gone through in chunks: the same loss and gradients, but for rounding.
        """
        if isinstance(student, LazySignals):
            return self._in_chunks(student, teachers, counts, watch)
        total = student.logits[:0].float().sum()  # zero: keeps the graph alive when no term has a token here
        means: dict[str, Tensor] = {}
        for term, count in zip(self.terms, counts, strict=True):
            said = student.where(term.owns(student.targets))
            taught = None
            if term.teacher is not None:
                everything = teachers[term.teacher]
                assert isinstance(everything, Signals), "lazy signals belong beside lazy ones"
                taught = everything.where(term.owns(everything.targets))
            part, means[term.name] = term.mean_of(said, taught, count)
            if watch is not None:
                watch(term, said, taught, part)
            total = total + part
        return total, means

    def _in_chunks(
        self,
        student: LazySignals,
        teachers: Mapping[str, Signals | LazySignals],
        counts: Int[Tensor, " K"],
        watch: Watch | None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        import torch

        from distill_llm.models.head import summed_in_chunks

        chunks = list(self._chunks(student, teachers))

        def loss_of(said: Signals, number: int) -> tuple[Tensor, Tensor]:
            chunk = chunks[number]
            last = chunk.first + chunk.stop - chunk.start
            taught = {name: signals.part(chunk.first, last) for name, signals in chunk.teachers.items()}
            means = counts.new_zeros(len(self.terms), dtype=torch.float32)
            total = means.sum()
            for index in chunk.terms:
                term = self.terms[index]
                answer = taught.get(term.teacher or "")
                part, means[index] = term.mean_of(said, answer, counts[index])
                if watch is not None:
                    watch(term, said, answer, part)
                total = total + part
            return total, means

        spans = [(chunk.start, chunk.stop) for chunk in chunks]
        total, means = summed_in_chunks(student, spans, loss_of, len(self.terms))
        return total, {term.name: mean for term, mean in zip(self.terms, means.unbind(), strict=True)}

    def _chunks(self, student: LazySignals, teachers: Mapping[str, Signals | LazySignals]) -> Iterator[_Chunk]:
        """All tokens of a chunk belong to the same terms, because they are of one target.

        A teacher may have many more words than the student: the one with the smallest chunks decides.
        """
        for target, (start, stop) in student.tokens.spans.items():
            terms = tuple(index for index, term in enumerate(self.terms) if TARGETS[target] in term.targets)
            if not terms:
                continue
            names = {self.terms[index].teacher for index in terms} - {None}
            said = {name: teachers[name].of_target(target) for name in names if name is not None}
            lazy = [one.signals.chunk_tokens for one in said.values() if isinstance(one, TargetSignals)]
            size = min([student.chunk_tokens, *lazy])
            for at in range(start, stop, size):
                yield _Chunk(at, min(at + size, stop), at - start, terms, said)
