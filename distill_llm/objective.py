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
from distill_llm.core.features import LOGITS, Features, Reading, Side, all_of
from distill_llm.core.schedule import Schedule, number_at
from distill_llm.core.signals import (
    IGNORE_INDEX,
    OWN,
    Batch,
    LazySignals,
    Signals,
    TargetSignals,
    aligned_labels,
)
from distill_llm.core.sparse import SparseSignals
from distill_llm.losses.base import Loss, TermLoss
from distill_llm.losses.layers import FeatureLoss

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    AnyLoss: TypeAlias = TermLoss
else:
    AnyLoss = any_of(TermLoss, "distill_llm.losses")


Taught: TypeAlias = Signals | SparseSignals
"""What a teacher says of some tokens: all its words, or those that were kept."""


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

    def for_learner(self, name: str, factor: float = 1.0) -> Term:
        """The same for another model that learns in the training, under another name, its weight times ``factor``."""
        if isinstance(self.weight, Schedule):
            ends = {"start": factor * self.weight.start, "end": factor * self.weight.end}
            weight: float | Schedule = self.weight.model_copy(update=ends)
        else:
            weight = factor * self.weight
        return self.model_copy(update={"name": f"{self.name}_{name}", "weight": weight})

    @property
    def layers(self) -> FeatureLoss | None:
        """Its loss, where that looks at layers and not at logits."""
        return self.loss if isinstance(self.loss, FeatureLoss) else None

    @property
    def side(self) -> Side:
        """Whose tokens it looks at: those of an encoder are the input's, and not supervised."""
        return "decoder" if self.layers is None else self.layers.side

    def of_each(self, student: Signals | Features, teacher: Taught | Features | None) -> Float[Tensor, " N"]:
        """The loss of each of the term's tokens, times what its row counts."""
        if isinstance(student, Features):
            assert self.layers is not None
            assert isinstance(teacher, Features)
            losses = self.layers(student, teacher, student.heads.get(self.name, ()))
        else:
            assert isinstance(self.loss, Loss)
            assert not isinstance(teacher, Features)
            losses = _on_logits(self.loss, student, teacher)
        if self.row_weight == "equal" or student.agreement is None:
            return losses
        return losses * student.agreement

    def mean_of(
        self, student: Signals | Features, teacher: Taught | Features | None, count: Int[Tensor, ""]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """What these tokens, of ``count`` in all, add to the loss; and to the term's mean, without a gradient."""
        weight = self.weight
        assert not isinstance(weight, Schedule), "a schedule is a number only `at` some progress"
        mean = self.of_each(student, teacher).sum() / count.clamp_min(1)
        return weight * mean, mean.detach()

    @property
    def numbers(self) -> tuple[int, ...]:
        """Its targets as batches number them; those of the student's own texts too where it has a teacher."""
        given = tuple(TARGETS.index(target) for target in self.targets)
        return given if self.teacher is None else (*given, *(number + OWN for number in given))

    def owns(self, targets: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Which entries belong to this term."""
        first, *others = self.numbers
        owned = targets == first
        for number in others:
            owned = owned | (targets == number)
        return owned


Watch = Callable[[Term, Signals, "Taught | None", "Tensor"], None]
"""Looks on while a loss is made: a term, what student and teacher say of some of its tokens, and what these add to the
loss, with its graph."""


def _on_logits(loss: Loss, student: Signals, teacher: Taught | None) -> Float[Tensor, " N"]:
    if teacher is None:
        return loss(student, None)
    if isinstance(teacher, SparseSignals):
        losses = loss.of_sparse(student.narrowed(teacher.width), teacher)
    else:
        if not loss.any_tokenizer:
            width = teacher.logits.size(-1)
            student, teacher = student.narrowed(width), teacher.narrowed(width)
        losses = loss(student, teacher)
    return losses if teacher.known is None else losses * teacher.known


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
    teachers: Mapping[str, Taught | TargetSignals]


class Objective:
    """``loss = sum_k weight_k * sum_{n in k} loss_k(n) / count_k``.

    ``count_k`` is the number of tokens of term k over the whole accumulated batch and all ranks, so a label of two
    tokens is not drowned by a rationale of eighty. With terms label and rationale this is the loss of Hsieh et al.
    2023, arXiv:2305.02301, eq. 3, with its two means over tokens. Row weights multiply losses, not counts: what a row
    adds does not depend on the weights of others. Where several models learn in one training, ``learners`` names for
    each term the one that it is for; empty: there is but one.
    """

    def __init__(self, terms: Sequence[Term], learners: Sequence[str] = ()):
        self.terms = tuple(terms)
        self.learners = tuple(learners)

    def at(self, progress: float) -> Objective:
        """The objective when a share ``progress`` (0..1) of the training is done: without terms that have ended."""
        going = [index for index, term in enumerate(self.terms) if progress < term.until]
        learners = [self.learners[index] for index in going] if self.learners else ()
        return Objective([self.terms[index].at(progress) for index in going], learners)

    def of(self, learner: str) -> Objective:
        """The terms of one learner; all of them where nobody is named."""
        return Objective([self.terms[index] for index in self._own(learner)])

    def one_by_one(self) -> Iterator[Objective]:
        """An objective of each term."""
        for index, term in enumerate(self.terms):
            yield Objective([term], self.learners[index : index + 1])

    def _own(self, learner: str) -> list[int]:
        return [index for index in range(len(self.terms)) if not self.learners or self.learners[index] == learner]

    def counts(self, batch: Batch) -> Int[Tensor, " K"]:
        """Tokens of each term in one batch: supervised ones, or the input's for a term on an encoder."""
        import torch

        per_row = {"decoder": (aligned_labels(batch) != IGNORE_INDEX).sum(1)}
        if "attention_mask" in batch:  # a picture has no tokens
            per_row["encoder"] = batch["attention_mask"].sum(1)
        return torch.stack([(per_row[term.side] * term.owns(batch["targets"])).sum() for term in self.terms])

    def rows_for(self, teacher: str, batch: Batch) -> Bool[Tensor, " B"]:
        """The rows about which some term asks this teacher."""
        import torch

        wanted = torch.zeros_like(batch["targets"], dtype=torch.bool)
        for term in self.terms:
            if term.teacher == teacher:
                wanted = wanted | term.owns(batch["targets"])
        return wanted

    def reading(self, teacher: str | None = None) -> Reading:
        """What the terms need besides logits, of one teacher, or of the student."""
        asked = [term.layers.reading for term in self.terms if term.layers and teacher in (None, term.teacher)]
        return all_of(asked) if asked else LOGITS

    def asks(self, teacher: str) -> frozenset[int]:
        """The targets (as batches number them) about which some term asks this teacher."""
        return frozenset(number for term in self.terms if term.teacher == teacher for number in term.numbers)

    def __call__(
        self,
        student: Signals | LazySignals,
        teachers: Mapping[str, Taught | LazySignals],
        counts: Int[Tensor, " K"],
        watch: Watch | None = None,
        learner: str = "",
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss, and each term's share of its mean. A teacher's signals may cover only the targets it teaches.

        A student's lazy signals are gone through in chunks: the same loss and gradients, but for rounding. ``learner``:
        whose signals ``student`` are, where several learn.
        """
        if self.learners:
            return self.of(learner)(student, teachers, counts[self._own(learner)], watch)
        deep, deep_means = self._of_layers(student, teachers, counts)
        if isinstance(student, LazySignals):
            total, means = self._in_chunks(student, teachers, counts, watch)
        else:
            total, means = self._at_once(student, teachers, counts, watch)
        return (total + deep if deep_means else total), means | deep_means

    def _of_layers(
        self,
        student: Signals | LazySignals,
        teachers: Mapping[str, Taught | LazySignals],
        counts: Int[Tensor, " K"],
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The terms on layers. Their states are there anyway, so that nothing is gained by chunks."""
        import torch

        total = counts.new_zeros((), dtype=torch.float32)
        means: dict[str, Tensor] = {}
        for term, count in zip(self.terms, counts, strict=True):
            if term.layers is None:
                continue
            said = student.features[term.side]
            said = said.where(term.owns(said.targets))
            means[term.name] = torch.zeros_like(total)
            if len(said.targets):  # else its teacher was not asked
                everything = teachers[term.teacher or ""]
                assert not isinstance(everything, SparseSignals), "the recipe was checked"
                taught = everything.features[term.side]
                part, means[term.name] = term.mean_of(said, taught.where(term.owns(taught.targets)), count)
                total = total + part
        return total, means

    def _at_once(
        self,
        student: Signals,
        teachers: Mapping[str, Taught | LazySignals],
        counts: Int[Tensor, " K"],
        watch: Watch | None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        total = student.logits[:0].float().sum()  # zero: keeps the graph alive when no term has a token here
        means: dict[str, Tensor] = {}
        for term, count in zip(self.terms, counts, strict=True):
            if term.layers is not None:
                continue
            said = student.where(term.owns(student.targets))
            taught = None
            if term.teacher is not None:
                everything = teachers[term.teacher]
                assert not isinstance(everything, LazySignals), "lazy signals belong beside lazy ones"
                taught = everything.where(term.owns(everything.targets))
            part, means[term.name] = term.mean_of(said, taught, count)
            if watch is not None:
                watch(term, said, taught, part)
            total = total + part
        return total, means

    def _in_chunks(
        self,
        student: LazySignals,
        teachers: Mapping[str, Taught | LazySignals],
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
        found = zip(self.terms, means.unbind(), strict=True)
        return total, {term.name: mean for term, mean in found if term.layers is None}

    def _chunks(self, student: LazySignals, teachers: Mapping[str, Taught | LazySignals]) -> Iterator[_Chunk]:
        """All tokens of a chunk belong to the same terms, because they are of one target.

        A teacher may have many more words than the student: the one with the smallest chunks decides.
        """
        for target, (start, stop) in student.tokens.spans.items():
            terms = tuple(
                index for index, term in enumerate(self.terms) if target in term.numbers and term.layers is None
            )
            if not terms:
                continue
            names = {self.terms[index].teacher for index in terms} - {None}
            said = {name: teachers[name].of_target(target) for name in names if name is not None}
            lazy = [one.signals.chunk_tokens for one in said.values() if isinstance(one, TargetSignals)]
            size = min([student.chunk_tokens, *lazy])
            for at in range(start, stop, size):
                yield _Chunk(at, min(at + size, stop), at - start, terms, said)
