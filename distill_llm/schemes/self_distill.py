"""Self-distillation (Zhang et al. 2019, arXiv:1905.08094): deep layers of the student teach exits at shallow ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from distill_llm.core.errors import ConfigError
from distill_llm.core.features import Reading, all_of
from distill_llm.core.signals import Batch, all_at_once
from distill_llm.objective import Objective, Term
from distill_llm.schemes.base import Comparison, Scheme, said_by_teachers, still
from distill_llm.schemes.stages import STUDENT, Sections, Stage
from distill_llm.teachers.base import TensorTeacherSpec

if TYPE_CHECKING:
    from distill_llm.models.head import OutputHead
    from distill_llm.models.load import LoadedModel
    from distill_llm.models.spec import StudentSpec
    from distill_llm.teachers.base import TensorTeacher

_TEACHER = "deepest"
_HIDDEN = Reading(hidden=frozenset({"decoder"}))


class SelfDistill(Scheme):
    """The student also speaks after fewer of its decoder's layers; each exit learns what the student learns.

    Terms against the teacher `deepest` are for the exits alone: they learn what the last layer says, which learns
    nothing by it. Zhang et al. 2019, arXiv:1905.08094, sec. 3.2, without their hints. An exit goes through the
    student's own last norm and head, as in LayerSkip (Elhoushi et al. 2024, arXiv:2404.16710), and so is an ordinary
    model of fewer layers; theirs has a bottleneck and a classifier of its own.
    """

    kind: Literal["self_distill"] = "self_distill"
    provides: ClassVar[frozenset[str]] = frozenset({_TEACHER})
    exits: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1,), min_length=1, description="the decoder's layers, counted from 1, after which it speaks too"
    )
    exit_weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="what each term counts at an exit, beside its own weight"
    )

    @field_validator("exits")
    @classmethod
    def _in_order(cls, exits: tuple[int, ...]) -> tuple[int, ...]:
        if list(exits) != sorted(set(exits)):
            raise ValueError(f"name each layer once, from the shallowest on: {sorted(set(exits))}")
        return exits

    @property
    def learners(self) -> tuple[str, ...]:
        return (STUDENT, *(f"exit_{layers}" for layers in self.exits))

    def describe(self, learner: str) -> str:
        return f"the student's decoder cut to its first {self._layers(learner)} layers"

    def stages(self, sections: Sections) -> tuple[Stage, ...]:
        if sections.student.load_in != "full":
            raise ValueError(
                f"an exit is saved with its adapters merged, which a base of `load_in: {sections.student.load_in}` "
                "does not allow without a loss. Set student.load_in: full"
            )
        return super().stages(sections)

    def check_terms(self, terms: Sequence[Term], teachers: Mapping[str, TensorTeacherSpec]) -> None:
        super().check_terms(terms, teachers)
        own = [term for term in terms if term.teacher != _TEACHER]
        if not own or all(term.until < 1 for term in own):
            raise ValueError(
                f"all terms that go on to the end are against `{_TEACHER}`, and these are for the exits alone: the "
                "student itself would learn nothing. Add a term on hard labels, or against another teacher"
            )
        if all(term.layers is not None or term.until < 1 for term in terms):
            raise ValueError("no term on logits goes on to the end, and the exits learn by no others. Add one")

    def check(self, recipe: Any) -> None:
        from distill_llm.models.exits import config_of, decoder_depth
        from distill_llm.models.load import check_student

        check_student(recipe.student)
        depth = decoder_depth(config_of(recipe.student))
        if self.exits[-1] >= depth:
            raise ConfigError(
                f"scheme.exits: {self.exits[-1]} is not before the last of the {depth} layers of the student's "
                f"decoder, where it speaks anyway. Expected numbers from 1 to {depth - 1}."
            )

    def extra_parameters(self, student: LoadedModel, spec: StudentSpec) -> int:
        """Each exit goes through the head once more."""
        head = student.model.get_output_embeddings()
        return len(self.exits) * sum(weight.numel() for weight in head.parameters())

    def assemble(self, student: LoadedModel, spec: StudentSpec, seed: int) -> LoadedModel:
        from distill_llm.models.exits import Exits

        Exits(student.model).check(student.model, self.exits)
        return student

    def each(self, model: Any) -> Iterator[tuple[str, Any]]:
        """An exit is the model itself, cut while it is used."""
        from distill_llm.models.exits import cut_to

        yield STUDENT, model
        for name, layers in zip(self.learners[1:], self.exits, strict=True):
            with cut_to(model, layers):
                yield name, model

    def save(self, learner: str, model: Any, folder: Path) -> None:
        from distill_llm.models.exits import save_merged

        if learner == STUDENT:
            super().save(learner, model, folder)
        else:
            save_merged(model, folder)

    def for_learners(self, objective: Objective) -> Objective:
        pairs = [(term, STUDENT) for term in objective.terms if term.teacher != _TEACHER]
        for name in self.learners[1:]:
            on_logits = (term for term in objective.terms if term.layers is None)
            pairs += [(term.for_learner(name, self.exit_weight), name) for term in on_logits]
        return Objective([term for term, _ in pairs], [name for _, name in pairs])

    def compare(
        self,
        model: Any,
        teachers: Mapping[str, TensorTeacher],
        batch: Batch,
        objective: Objective,
        head: OutputHead | None = None,
    ) -> list[Comparison]:
        from distill_llm.models.exits import Exits
        from distill_llm.models.head import OutputHead

        exits = Exits(model)
        read = (head or OutputHead(model)).read(model, batch, all_of([objective.reading(), _HIDDEN]))
        states = read.features["decoder"].hidden
        lazily = [replace(read, hidden=exits.read(states[layers]), features={}) for layers in self.exits]
        said = [all_at_once(one) if head is None else one for one in (read, *lazily)]
        taught = said_by_teachers(teachers, batch, objective, said[0]) | {_TEACHER: still(said[0])}
        return [(one, taught) for one in said]

    def _layers(self, learner: str) -> int:
        return self.exits[self.learners.index(learner) - 1]
