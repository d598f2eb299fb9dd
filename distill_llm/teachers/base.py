"""Teachers: a text teacher is asked for completions, a tensor teacher for signals."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import Field

from distill_llm.core.component import Component
from distill_llm.core.errors import ConfigError

if TYPE_CHECKING:
    from distill_llm.core.example import Example
    from distill_llm.core.signals import Batch, Signals
    from distill_llm.tasks.base import Task


class Sampling(Component):
    """How a teacher writes. Part of a completion's key: another setting is another completion."""

    temperature: float = Field(default=0.0, ge=0, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=256, gt=0)
    stop: tuple[str, ...] = Field(default=(), description="text at which a completion ends")


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to be had; ``sample`` counts from 0."""

    key: str
    example: Example
    split: str
    sample: int
    prompt: str


@dataclass(frozen=True, slots=True)
class Completion:
    """Raw text, as the teacher wrote it."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0


class TextTeacher(Protocol):
    """A live teacher of text. ``identity`` names model and revision, and is part of every key."""

    identity: str

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Completion]]:
        """Completions in any order, each given as soon as it is there, so that it can be journaled."""
        ...


class TextTeacherSpec(Component):
    """The recipe's side of a text teacher."""

    knows_answers: ClassVar[bool] = False
    """It repeats gold labels, so that scoring it would say nothing."""
    computes: ClassVar[bool] = True
    """It writes while it is asked, so that its speed means something."""

    def check(self) -> None:
        """Raises ConfigError where it cannot be had. Loads no weights; called before anything is written."""

    @abstractmethod
    def open(self, *, task: Task, sampling: Sampling, seed: int) -> TextTeacher:
        """Connects, or prepares to load at the first question. Heavy packages are imported here."""

    @abstractmethod
    def describe(self) -> TeacherFacts:
        """What tables and cards say of it, read without its weights."""


@dataclass(frozen=True, slots=True)
class TeacherFacts:
    """``parameters`` and ``num_bytes`` (of its weights on disk) are None where nobody can know."""

    name: str
    parameters: int | None = None
    num_bytes: int | None = None


class TensorTeacher(Protocol):
    """A live teacher of signals."""

    def signals(self, batch: Batch) -> Signals:
        """Its signals at the supervised tokens of ``batch``, without gradient."""
        ...


class TensorTeacherSpec(Component):
    """The recipe's side of a tensor teacher."""

    def check(self) -> None:
        """Raises ConfigError where it cannot be had. Loads no weights; called before anything is written."""

    @abstractmethod
    def open(self, student: StudentFacts) -> TensorTeacher:
        """Loads the teacher, and checks that its words are the student's."""

    @abstractmethod
    def num_parameters(self) -> int:
        """The teacher's size, for the compute of a step; read from its config, without its weights."""


@dataclass(frozen=True, slots=True)
class StudentFacts:
    """What a tensor teacher must agree with."""

    vocabulary: dict[str, int]
    is_encoder_decoder: bool
    vocab_size: int
    device: str

    def must_share(self, vocabulary: dict[str, int], config: Any, where: str) -> None:
        """Raises ConfigError where families, token ids or head widths differ: losses would compare other words."""
        if config.is_encoder_decoder != self.is_encoder_decoder:
            names = {True: "an encoder-decoder", False: "decoder-only"}
            raise ConfigError(
                f"{where}: the teacher is {names[config.is_encoder_decoder]}, the student is "
                f"{names[self.is_encoder_decoder]}. A loss on logits needs two models of one family; teach by "
                "rationales (text) instead."
            )
        if vocabulary != self.vocabulary:
            different = [word for word, index in self.vocabulary.items() if vocabulary.get(word) != index]
            raise ConfigError(
                f"{where}: teacher and student have different vocabularies ({len(vocabulary)} and "
                f"{len(self.vocabulary)} entries; {len(different)} of the student's are missing or elsewhere, such as "
                f"{different[:3]}). Give the student the teacher's tokenizer (`student.tokenizer`), or teach by text."
            )
        if config.vocab_size != self.vocab_size:
            raise ConfigError(
                f"{where}: the heads have {config.vocab_size} (teacher) and {self.vocab_size} (student) entries, "
                "although the tokenizers are the same: one is padded further. Choose models padded alike."
            )
