"""A scheme is who teaches whom: hooks around the one trainer, each with the usual default.

M tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill_llm.core.component import Component
from distill_llm.core.signals import Batch, LazySignals, Signals, select_rows, signals_of
from distill_llm.core.sparse import SparseSignals
from distill_llm.models.forward import forward
from distill_llm.schemes.stages import STUDENT, Sections, Stage, describe
from distill_llm.teachers.base import DeepTeacher, LazyTeacher

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from distill_llm.core.example import Target
    from distill_llm.core.features import Reading
    from distill_llm.data.collate import Collator
    from distill_llm.models.head import OutputHead
    from distill_llm.models.load import LoadedModel
    from distill_llm.models.spec import StudentSpec
    from distill_llm.objective import Objective, Term
    from distill_llm.teachers.base import TensorTeacher, TensorTeacherSpec

Taught = Signals | LazySignals | SparseSignals
Comparison = tuple[Signals | LazySignals, Mapping[str, Taught]]
"""A student's signals, and those of its teachers. A teacher's are lazy only where the student's are."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a training stands before an optimiser step: ``step`` steps are done, which is a share ``progress`` (0..1).

    ``objective`` has its terms of this step. ``collator`` is what the batches were made with.
    """

    step: int
    progress: float
    seed: int
    objective: Objective
    collator: Collator
    tokenizer: Any


class Scheme(Component):
    """Base of all schemes. A new hook belongs here only with a default that suits every other scheme.

    Those that learn in one training have names, which are also those of the arms that they become; ``student`` is the
    only one, unless a scheme says otherwise.
    """

    provides: ClassVar[frozenset[str]] = frozenset()
    """Names of teachers that terms may name, and that are models of the training itself."""

    offers: ClassVar[frozenset[str]] = frozenset()
    """Names of stages that terms of the recipe may name as teachers, as the teachers of later stages."""

    converts: ClassVar[bool] = False
    """What is saved is not what was trained: ``save`` writes it, and not Trainer."""

    writes: ClassVar[bool] = False
    """It has the student write some of the texts that it learns from."""

    def resolved(self, sections: Sections) -> Scheme:
        """With all that configs of models decide, such as sizes between two of them; reads no weights.

        Called before anything is checked or written. Raises ConfigError where a config cannot be had.
        """
        return self

    def stages(self, sections: Sections) -> tuple[Stage, ...]:
        """The trainings of a recipe, each after those that it needs; the student's is the last.

        Raises ValueError where the scheme cannot be had with these sections. Reads no file.
        """
        terms = sections.objective
        return (Stage(STUDENT, describe(terms), sections.student, sections.teachers, terms, scheme=self),)

    def alone(self) -> Scheme:
        """The scheme of an ablation, whose objective has fewer terms: one training of one model."""
        return self

    @property
    def learners(self) -> tuple[str, ...]:
        """Who learns in one training of the student."""
        return (STUDENT,)

    def describe(self, learner: str) -> str:
        """What a learner is, where it is not the student."""
        return ""

    def check_terms(self, terms: Sequence[Term], teachers: Mapping[str, TensorTeacherSpec]) -> None:
        """Raises ValueError where an objective of these terms makes no sense with this scheme. Reads no file."""
        for term in terms:
            if term.teacher in self.provides and term.layers is not None:
                raise ValueError(
                    f"term {term.name} looks at layers, and of `{term.teacher}` there are logits alone. Take a loss on "
                    "logits, such as forward_kl"
                )
        names = {term.name for term in terms}
        taken = sorted(names & {f"{name}_{learner}" for name in names for learner in self.learners})
        if taken:
            raise ValueError(f"{taken} are names of terms that the scheme makes itself. Rename them")

    def extra_parameters(self, student: LoadedModel, spec: StudentSpec) -> int:
        """Parameters that each token passes besides the student's own, for the compute of a step."""
        return 0

    def saved_bytes(self, student: Any) -> int | None:
        """On disk, of the weights of a finished model; None: as it is trained. ``student``'s may have no numbers."""
        return None

    def assemble(self, student: LoadedModel, spec: StudentSpec, seed: int) -> LoadedModel:
        """The model that is trained: the student, and whoever learns with it.

        Raises ConfigError where they do not go together. Draws from no generator whose state the training goes on with.
        """
        return student

    def each(self, model: Any) -> Iterator[tuple[str, Any]]:
        """The learners in an assembled model, in their order; each is to be used before the next is asked for."""
        yield STUDENT, model

    def student_among(self, scores: Mapping[str, float]) -> str:
        """The learner that becomes the student, by accuracy on validation; empty where nothing was validated."""
        return self.learners[0]

    def save(self, learner: str, model: Any, folder: Path) -> None:
        """Writes a learner that ``each`` gave as a Hugging Face folder of its own. Where the scheme ``converts``, the
        model is another one afterwards."""
        from distill_llm.models.layers import without_heads
        from distill_llm.models.lora import save_bits

        model.save_pretrained(str(folder), state_dict=without_heads(model.state_dict()))
        save_bits(model, folder)

    def for_learners(self, objective: Objective) -> Objective:
        """The objective with a term for each learner that has it; a term of the first keeps its name."""
        return objective

    def at_step(self, objective: Objective, step: int, seed: int) -> Objective:
        """The objective of one optimiser step, the ``step``-th from 0; what is drawn for it is drawn from ``seed``."""
        return objective

    def check_recipe(self, recipe: Any) -> None:
        """Raises ValueError where the sections of ``recipe``, a Recipe, do not suit it. Reads no file."""

    def check(self, recipe: Any) -> None:
        """Raises ConfigError where what it needs cannot be had. Loads no weights; called before anything is written."""

    def extra_passes(self, terms: Sequence[Term], target: Target) -> float:
        """How often the student reads a row of ``target`` besides its training step, without a gradient, on average
        over a training with these terms: for the compute of an arm."""
        return 0.0

    def written_tokens(self, target: Target) -> int:
        """Tokens of the longest text that the student may write for ``target``; 0 where it writes none."""
        return 0

    def prepare(self, batches: list[Batch], model: Any, moment: Moment) -> list[Batch]:
        """Rewrites the batches of one optimiser step, before their tokens are counted. ``model`` is not wrapped."""
        return batches

    def compare(
        self,
        model: Any,
        teachers: Mapping[str, TensorTeacher],
        batch: Batch,
        objective: Objective,
        head: OutputHead | None = None,
    ) -> list[Comparison]:
        """Forwards learners and teachers. One pair for each learner, in their order.

        ``model`` is the wrapped model: calling an inner module would skip the gradient's reduction over ranks.
        ``head``: the student's, where its logits are to be made in chunks; None: all at once. ``objective`` is one that
        ``for_learners`` gave, or some of its terms.
        """
        student = said_by(model, batch, objective.reading(), head)
        return [(student, said_by_teachers(teachers, batch, objective, student))]


def said_by(model: Any, batch: Batch, reading: Reading, head: OutputHead | None) -> Signals | LazySignals:
    """What a learner says: one forward pass; lazily where it has a ``head``."""
    if head is not None:
        return head.read(model, batch, reading)
    passed = forward(model, batch, reading)
    said = signals_of(passed.outputs.logits, batch, passed.at)
    if reading:
        from distill_llm.models.layers import heads_of

        said = replace(said, features=passed.features(batch, reading, heads_of(model)))
    return said


def said_by_teachers(
    teachers: Mapping[str, TensorTeacher], batch: Batch, objective: Objective, student: Signals | LazySignals
) -> dict[str, Taught]:
    """What each of the recipe's teachers says, of the tokens that it is asked about."""
    if isinstance(student, LazySignals):
        return _lazily(teachers, batch, objective, student)
    said: dict[str, Taught] = {}
    for name, teacher in teachers.items():
        if not any(term.teacher == name for term in objective.terms):
            continue  # its terms have ended
        rows = objective.rows_for(name, batch)
        if bool(rows.any()):
            said[name] = _asked(teacher, "signals", select_rows(batch, rows), objective.reading(name))
        else:
            said[name] = student.where(student.targets < 0)
    return said


def still(said: Signals | LazySignals) -> Signals | LazySignals:
    """What a learner says, for others to learn from: no gradient goes back, and its layers are not shown."""
    if isinstance(said, Signals):
        return replace(said, logits=said.logits.detach(), features={})
    make_logits = partial(_without_gradient, said.make_logits)
    return replace(
        said,
        hidden=said.hidden.detach(),
        make_logits=make_logits,
        weights=(),
        anchor=said.anchor.detach(),
        features={},
    )


def _without_gradient(make_logits: Callable[[Tensor], Tensor], hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
    import torch

    with torch.no_grad():
        return make_logits(hidden)


def _lazily(
    teachers: Mapping[str, TensorTeacher], batch: Batch, objective: Objective, student: LazySignals
) -> dict[str, Taught]:
    """What each teacher says of the targets that it is asked about; nothing of one that has no token here."""
    said: dict[str, Taught] = {}
    here = set(student.tokens.spans)
    for name, teacher in teachers.items():
        asked = objective.asks(name) & here
        if not asked:
            continue
        part = batch if asked == here else select_rows(batch, objective.rows_for(name, batch))
        how = "lazy_signals" if isinstance(teacher, LazyTeacher) else "signals"
        said[name] = _asked(teacher, how, part, objective.reading(name))
    return said


def _asked(teacher: TensorTeacher, how: Literal["signals", "lazy_signals"], batch: Batch, reading: Reading) -> Taught:
    """Its signals, with its layers where the objective looks at them."""
    if not reading:
        return getattr(teacher, how)(batch)
    assert isinstance(teacher, DeepTeacher), "checked when the teachers were opened"
    return getattr(teacher, how)(batch, reading)
