"""Quantization-aware distillation: the student learns to be right with the rounded weights that it will have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from distill_llm.core.signals import Batch
from distill_llm.models.quantize import QuantizeSpec
from distill_llm.objective import Term
from distill_llm.schemes.base import Moment, Scheme
from distill_llm.schemes.stages import STUDENT, Sections, Stage, begun_by, describe
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.frozen import Frozen

if TYPE_CHECKING:
    from distill_llm.models.load import LoadedModel
    from distill_llm.models.spec import StudentSpec

FULL = "full_precision"
AFTERWARDS = "quantized_afterwards"
LONGER = "full_precision_longer"
LONGER_AFTERWARDS = "longer_quantized_afterwards"


class QuantizationAware(Scheme):
    """LLM-QAT (Liu et al. 2023, arXiv:2305.17888, sec. 2.1): a model in full precision, then the same, rounded as it
    learns, with itself in full precision as its teacher, where a term names `full_precision`.

    `quantized_afterwards` is the full-precision model, quantized without further training, to be compared with. In
    place of the text that LLM-QAT has the model generate, all stages learn the recipe's rows; the rest of the terms,
    and their teachers, are the recipe's.
    """

    offers: ClassVar[frozenset[str]] = frozenset({FULL})
    converts: ClassVar[bool] = True
    kind: Literal["quantization_aware"] = "quantization_aware"
    quantize: QuantizeSpec = QuantizeSpec()
    share_of_steps: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="of the recipe's steps, for the training in full precision; the rounded student has the others. 0: "
        "`student.model` is trained enough",
    )
    after: float = Field(
        default=0.0, ge=0, lt=1, description="share of the student's own steps in which nothing is rounded yet"
    )
    longer: bool = Field(
        default=False,
        description="for comparison, the full-precision model also trained on for the student's steps, and that one "
        "quantized afterwards",
    )

    def stages(self, sections: Sections) -> tuple[Stage, ...]:
        own = tuple(term for term in sections.objective if term.teacher != FULL)
        self._check(sections, own)
        first = Stage(
            FULL,
            describe(own) if self.share_of_steps else f"{sections.student.model} as it is",
            sections.student,
            sections.teachers,
            own,
            StepByStep(),
            share_of_steps=self.share_of_steps,
        )
        stages = [first, self._quantized(AFTERWARDS, FULL, sections, own)]
        student = begun_by(sections.student, sections.model_of(FULL))
        teachers = {**sections.teachers, FULL: Frozen(model=sections.model_of(FULL))}
        terms, rest = sections.objective, 1 - self.share_of_steps
        if self.longer:
            said = f"{describe(terms)}, trained on in full precision"
            after = (FULL,)
            stages += [
                Stage(LONGER, said, student, teachers, terms, StepByStep(), after=after, share_of_steps=rest),
                self._quantized(LONGER_AFTERWARDS, LONGER, sections, terms),
            ]
        said = f"{describe(terms)}; learned with {self.quantize}"
        stages.append(Stage(STUDENT, said, student, teachers, terms, self, after=(FULL,), share_of_steps=rest))
        return tuple(stages)

    def alone(self) -> Scheme:
        """One training in full precision."""
        return StepByStep()

    def check_recipe(self, recipe: Any) -> None:
        terms = {term.name for term in recipe.objective if term.teacher == FULL}
        for ablation, kept in recipe.evaluate.ablations.items():
            wrong = sorted(terms & set(kept))
            if wrong:
                raise ValueError(
                    f"evaluate.ablations.{ablation}: {wrong} learn from `{FULL}`, and an ablation is one training in "
                    "full precision, without stages. Take them out of it"
                )

    def check(self, recipe: Any) -> None:
        from distill_llm.models.load import check_student
        from distill_llm.models.quantize import check_layers

        check_student(recipe.student)
        check_layers(recipe.student, self.quantize, where="scheme.quantize")

    def saved_bytes(self, student: Any) -> int | None:
        from distill_llm.models.quantize import quantized_bytes

        return quantized_bytes(student, self.quantize, where="scheme.quantize")

    def assemble(self, student: LoadedModel, spec: StudentSpec, seed: int) -> LoadedModel:
        from distill_llm.models.quantize import prepared

        prepared(student.model, self.quantize, where="scheme.quantize")
        return student

    def each(self, model: Any) -> Iterator[tuple[str, Any]]:
        """The student as it will be saved, before ``after`` too: validation chooses among what is left in the end."""
        from distill_llm.models.quantize import as_quantized

        with as_quantized(model):
            yield STUDENT, model

    def prepare(self, batches: list[Batch], model: Any, moment: Moment) -> list[Batch]:
        if self.after:
            from distill_llm.models.quantize import fake

            fake(model, moment.progress >= self.after)
        return batches

    def save(self, learner: str, model: Any, folder: Path) -> None:
        from distill_llm.models.layers import drop_heads
        from distill_llm.models.quantize import quantized, save_quantized

        drop_heads(model)
        save_quantized(quantized(model, self.quantize, where="scheme.quantize"), folder)

    def _quantized(self, name: str, of: str, sections: Sections, terms: tuple[Term, ...]) -> Stage:
        """The model of stage ``of`` with integer weights."""
        return Stage(
            name,
            f"{of.replace('_', ' ')}, quantized: {self.quantize}",
            begun_by(sections.student, sections.model_of(of)),
            sections.teachers,
            terms,
            self.model_copy(update={"after": 0.0, "longer": False}),
            after=(of,),
            share_of_steps=0.0,
        )

    def _check(self, sections: Sections, own: tuple[Term, ...]) -> None:
        student = sections.student
        if student.lora is not None:
            raise ValueError(
                "adapters would be merged into weights that were rounded without them: the weights themselves have to "
                "learn. Remove `student.lora`"
            )
        if self.share_of_steps and not own:
            raise ValueError(
                f"every term learns from `{FULL}`, so that nothing would teach that model itself. Add a term on hard "
                "labels or against another teacher, or name a trained `student.model` and set share_of_steps: 0"
            )
        if not self.share_of_steps and not student.model:
            raise ValueError(
                "share_of_steps: 0 begins from a model that is trained, and the student is a fresh one. Give "
                "`student.model`, or a share of the steps"
            )
