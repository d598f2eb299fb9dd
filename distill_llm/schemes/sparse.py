"""Zeros among the weights, by their magnitude, that come while the student learns and stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distill_llm.core.signals import Batch
from distill_llm.models.sparse import Pattern
from distill_llm.schemes.base import Moment, Scheme
from distill_llm.schemes.stages import STUDENT, Sections, Stage, describe
from distill_llm.schemes.step_by_step import StepByStep

if TYPE_CHECKING:
    from distill_llm.models.load import LoadedModel
    from distill_llm.models.spec import StudentSpec


class Sparse(Scheme):
    """Gradual magnitude pruning (Zhu & Gupta 2017, arXiv:1710.01878, sec. 3): after a share t of `until`, each matrix
    has a share `sparsity` * (1 - (1 - t)^3) of zeros. 2:4 (Mishra et al. 2021, arXiv:2104.08378): two zeros in such a
    share of the groups of four.

    The smallest weights are set to zero before each step, so that a checkpoint needs no masks. A zero has no gradient:
    it stays where the optimiser has no momentum, and moves by what is left of that elsewhere, seldom for long.

    The file is no smaller and a plain matrix product no faster for it: it is for runtimes that know zeros.
    """

    converts: ClassVar[bool] = True
    kind: Literal["sparse"] = "sparse"
    pattern: Pattern = Field(
        default="unstructured", description='unstructured: zeros anywhere; "2:4": two in each four weights of a row'
    )
    sparsity: float = Field(default=0.5, gt=0, lt=1, description="share of zeros in each linear layer but the head")
    until: float = Field(
        default=0.5, ge=0, lt=1, description="share of the steps over which zeros come; 0: all before the first step"
    )

    @model_validator(mode="after")
    def _half_of_each_four(self) -> Sparse:
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError(f'pattern "2:4" has a sparsity of 0.5; it is {self.sparsity:g}. Remove `sparsity`')
        return self

    def stages(self, sections: Sections) -> tuple[Stage, ...]:
        if sections.student.lora is not None:
            raise ValueError(
                "adapters would be merged into the zeros, and fill them: the weights themselves have to learn. Remove "
                "`student.lora`"
            )
        terms, how = sections.objective, "2 of 4" if self.pattern == "2:4" else f"{self.sparsity:.0%}"
        said = f"{describe(terms)}; {how} of linear weights zero"
        return (Stage(STUDENT, said, sections.student, sections.teachers, terms, scheme=self),)

    def alone(self) -> Scheme:
        """Without zeros."""
        return StepByStep()

    def check(self, recipe: Any) -> None:
        from distill_llm.models.load import check_student
        from distill_llm.models.sparse import check_sparse

        check_student(recipe.student)
        check_sparse(recipe.student, self.pattern, where="scheme")

    def assemble(self, student: LoadedModel, spec: StudentSpec, seed: int) -> LoadedModel:
        from distill_llm.models.sparse import keep_zeros, sparse_layers

        keep_zeros(sparse_layers(student.model, self.pattern, where="scheme"))
        return student

    def each(self, model: Any) -> Iterator[tuple[str, Any]]:
        """With all zeros, before they have come too: validation chooses among what is saved in the end."""
        from distill_llm.models.sparse import with_zeros

        with with_zeros(self._layers(model), self.pattern, self._share(1.0)):
            yield STUDENT, model

    def prepare(self, batches: list[Batch], model: Any, moment: Moment) -> list[Batch]:
        from distill_llm.models.sparse import make_zeros

        there = 1.0 if moment.progress >= self.until else moment.progress / self.until
        make_zeros(self._layers(model), self.pattern, self._share(there))
        return batches

    def _share(self, there: float) -> float:
        """Of weights, or of groups of four, when zeros have come a part ``there`` of their way."""
        return (1.0 if self.pattern == "2:4" else self.sparsity) * (1 - (1 - there) ** 3)

    def _layers(self, model: Any) -> Any:
        from distill_llm.models.sparse import sparse_layers

        return sparse_layers(model, self.pattern, where="scheme")
