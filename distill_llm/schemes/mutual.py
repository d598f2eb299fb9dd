"""Deep mutual learning (Zhang et al. 2018, arXiv:1706.00384): students that learn at once, each from its peers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from distill_llm.core.component import Component
from distill_llm.core.errors import ConfigError
from distill_llm.core.signals import Batch, LazySignals, Signals
from distill_llm.models.spec import HubConfig, StudentSpec
from distill_llm.objective import Objective, Term
from distill_llm.schemes.base import Comparison, Scheme, said_by, said_by_teachers, still
from distill_llm.schemes.stages import STUDENT, TAKEN, Sections, Stage
from distill_llm.teachers.base import TensorTeacherSpec, with_members
from distill_llm.teachers.ensemble import EnsembleTeacher

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.models.head import OutputHead
    from distill_llm.models.load import LoadedModel
    from distill_llm.models.peers import Peers
    from distill_llm.teachers.base import TensorTeacher

_TEACHER = "peers"
_FIRST = "peer_1"
"""The name of the student that the recipe's section `student` describes."""


_TAKEN = frozenset({_FIRST, STUDENT, *TAKEN})


class Peer(Component):
    """A student beside the recipe's: a model from the Hub or a folder, or a fresh one; in all else as `student`."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="names its arm: models/<name>")
    model: str = Field(default="", description="Hub id or folder, with the student's tokenizer")
    revision: str = "main"
    config: HubConfig = Field(default_factory=dict, description="a fresh model: model_type and its sizes")

    @model_validator(mode="after")
    def _one_source(self) -> Peer:
        if bool(self.model) == bool(self.config):
            raise ValueError(f"peer {self.name}: give either `model` or `config`, not both or neither")
        return self


class Mutual(Scheme):
    """Several students in one training; a term against the teacher `peers` learns from the mean of all others.

    Zhang et al. 2018, arXiv:1706.00384, eq. 6 and 7, with the mean of the peers' probabilities as the target (their
    DML_e); they update one network after another, here one step of the optimiser moves all, each by what the others
    said before it.
    """

    kind: Literal["mutual"] = "mutual"
    provides: ClassVar[frozenset[str]] = frozenset({_TEACHER})
    peers: Annotated[int, Field(ge=1, le=16)] | tuple[Peer, ...] = Field(
        default=2, description="how many students, all as `student` says; or those that learn beside it"
    )

    @field_validator("peers")
    @classmethod
    def _names_differ(cls, peers: int | tuple[Peer, ...]) -> int | tuple[Peer, ...]:
        names = [] if isinstance(peers, int) else [peer.name for peer in peers]
        if len(set(names)) < len(names) or _TAKEN & set(names):
            raise ValueError(f"peers need names of their own, other than {sorted(_TAKEN)}, but these are {names}")
        return peers

    @property
    def learners(self) -> tuple[str, ...]:
        if isinstance(self.peers, int):
            return tuple(f"peer_{number}" for number in range(1, self.peers + 1))
        return (_FIRST, *(peer.name for peer in self.peers))

    def describe(self, learner: str) -> str:
        return "a peer of the student"

    def stages(self, sections: Sections) -> tuple[Stage, ...]:
        if sections.student.cut is not None and not sections.student.fresh:
            raise ValueError(
                "peers that are cut out of one model are one model: remove `student.cut`, or cut in a recipe of its "
                "own and name what it made as a peer"
            )
        self._beside(sections.student)
        return super().stages(sections)

    def check_terms(self, terms: Sequence[Term], teachers: Mapping[str, TensorTeacherSpec]) -> None:
        super().check_terms(terms, teachers)
        own = [term for term in terms if term.teacher != _TEACHER]
        if not own or all(term.until < 1 for term in own):
            raise ValueError(
                f"all terms that go on to the end are against `{_TEACHER}`: students that only copy each other learn "
                "nothing. Add a term on hard labels, or against another teacher"
            )
        asked = {term.teacher for term in own if term.teacher is not None}
        for name in sorted(asked):
            moving = [one for one in with_members(teachers, name) if teachers[one].moves]
            if moving:
                raise ValueError(
                    f"teacher {moving[0]} is the average of one student, and here several learn. Leave it out: the "
                    "peers are each other's teachers, or train one student with it (step_by_step)"
                )

    def _beside(self, student: StudentSpec) -> dict[str, StudentSpec]:
        """The students beside the recipe's own. Raises ValueError where one cannot be."""
        if isinstance(self.peers, int):
            return dict.fromkeys(self.learners[1:], student)
        found = {}
        for peer in self.peers:
            if peer.model and not isinstance(student.tokenizer, str):
                raise ValueError(
                    f"peer {peer.name} is '{peer.model}', whose words are its own tokenizer's, but `student.tokenizer` "
                    "is trained on the spot. Name the peer's folder as student.tokenizer, or give the peer a config"
                )
            source = {"model": peer.model, "revision": peer.revision, "config": peer.config}
            if peer.config and student.tokenizer == "":
                source["tokenizer"] = student.model
            try:
                found[peer.name] = StudentSpec.model_validate(student.model_dump() | source)
            except ValidationError as error:
                said = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"peer {peer.name}, in all else as `student`: {said}") from None
        return found

    def check(self, recipe: Any) -> None:
        from distill_llm.models.load import check_student, load_tokenizer, read_tokenizer

        student: StudentSpec = recipe.student
        is_encoder_decoder = check_student(student)
        for name, spec in self._beside(student).items():
            where = f"scheme.peers.{name}"
            if check_student(spec, where=where) != is_encoder_decoder:
                raise ConfigError(
                    f"{where}: it and the student are an encoder-decoder and a decoder-only model. All peers read the "
                    "same rows: choose models of one family."
                )
            if spec.model and spec.model != student.model:
                words = load_tokenizer(student, ()).get_vocab()
                if read_tokenizer(spec.model, spec.revision, where=where).get_vocab() != words:
                    raise ConfigError(
                        f"{where}: '{spec.model}' has another vocabulary than the student, so that their words cannot "
                        "be compared. Choose models with one tokenizer."
                    )

    def extra_parameters(self, student: LoadedModel, spec: StudentSpec) -> int:
        from distill_llm.models.load import parameters_of

        if isinstance(self.peers, int):
            return (self.peers - 1) * student.num_parameters
        beside = self._beside(spec).items()
        return sum(parameters_of(one, student.tokenizer, where=f"scheme.peers.{name}") for name, one in beside)

    def assemble(self, student: LoadedModel, spec: StudentSpec, seed: int) -> LoadedModel:
        from transformers import set_seed

        from distill_llm.models.load import LoadedModel, build_student
        from distill_llm.models.peers import Peers, must_differ

        models = {_FIRST: student.model}
        for number, (name, one) in enumerate(self._beside(spec).items(), start=1):
            set_seed(seed + number)  # the trainer sets the recipe's own again
            built = build_student(one, student.tokenizer, where=f"scheme.peers.{name}")
            models[name] = built.model.to(student.model.device)
        peers = Peers(models, width=max(student.tokenizer.get_vocab().values()) + 1)
        must_differ(peers)
        return LoadedModel(peers, student.tokenizer)

    def each(self, model: Any) -> Iterator[tuple[str, Any]]:
        yield from zip(model.names, model.peers, strict=True)

    def student_among(self, scores: Mapping[str, float]) -> str:
        return max(self.learners, key=lambda name: scores.get(name, 0.0))

    def for_learners(self, objective: Objective) -> Objective:
        """Alone a student has nobody to learn from, and the terms against its peers fall away."""
        terms = [term for term in objective.terms if len(self.learners) > 1 or term.teacher != _TEACHER]
        pairs = [
            (term.for_learner(name) if number else term, name)
            for number, name in enumerate(self.learners)
            for term in terms
        ]
        return Objective([term for term, _ in pairs], [name for _, name in pairs])

    def compare(
        self,
        model: Any,
        teachers: Mapping[str, TensorTeacher],
        batch: Batch,
        objective: Objective,
        head: OutputHead | None = None,
    ) -> list[Comparison]:
        reading = objective.reading()

        def read(peers: Peers) -> tuple[list[Signals | LazySignals], int, list[Tensor]]:
            said = [said_by(peer, batch, reading, head.beside(peer) if head else None) for peer in peers.peers]
            # Wrappers look for tensors with a graph in the answer, and do not find those that stand in signals.
            return said, peers.width, [one.anchor if isinstance(one, LazySignals) else one.logits for one in said]

        said, width, _ = model(read)
        taught = said_by_teachers(teachers, batch, objective, said[0])
        if not any(term.teacher == _TEACHER for term in objective.terms):
            return [(one, taught) for one in said]
        others = [_Said(one) for one in said]
        return [
            (one, taught | {_TEACHER: _mean([*others[:number], *others[number + 1 :]], width, batch)})
            for number, one in enumerate(said)
        ]


class _Said:
    """What a peer said just now, as a teacher says it."""

    def __init__(self, said: Signals | LazySignals):
        self.lazy = isinstance(said, LazySignals)
        self._said: Any = still(said)

    def signals(self, batch: Batch) -> Signals:
        return self._said

    def lazy_signals(self, batch: Batch) -> LazySignals:
        return self._said


def _mean(peers: Sequence[_Said], width: int, batch: Batch) -> Signals | LazySignals:
    """The mean of the probabilities that ``peers`` give to the first ``width`` words."""
    mean = EnsembleTeacher(peers, (1.0,) * len(peers), mean="probabilities", by="fixed", width=width)
    return mean.lazy_signals(batch) if peers[0].lazy else mean.signals(batch)
