"""Teachers: a text teacher is asked for completions, a tensor teacher for signals."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from pydantic import Field

from distill_llm.core.component import Component
from distill_llm.core.example import TARGETS, Target
from distill_llm.core.features import LOGITS, Reading, Shape, Side
from distill_llm.losses.layers import FeatureLoss

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill_llm.core.example import Example
    from distill_llm.core.signals import Batch, LazySignals, Signals
    from distill_llm.core.sparse import SparseSignals
    from distill_llm.losses.base import TermLoss
    from distill_llm.tasks.base import Task
    from distill_llm.teachers.several import Member
    from distill_llm.teachers.student import StudentFacts
    from distill_llm.teachers.view import Reader, TeacherView


class Sampling(Component):
    """How a teacher writes. Part of a completion's key: another setting is another completion."""

    temperature: float = Field(default=0.0, ge=0, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=256, gt=0)
    stop: tuple[str, ...] = Field(default=(), description="text at which a completion ends")
    top_logprobs: int = Field(
        default=0, ge=0, le=100, description="keep the log-probabilities of so many likeliest tokens at each place"
    )


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


Prompt: TypeAlias = str | tuple[Message, ...]
"""What a teacher reads: plain text to go on with, or a chat whose last turn is the user's."""


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to be had; ``sample`` counts from 0. ``hinted``: the prompt tells the gold label. ``teacher``:
    which of several is asked.

    ``key`` holds all that decides the text, the seed of sampling included: a teacher that draws, draws by it.
    """

    key: str
    example: Example
    split: str
    sample: int
    prompt: Prompt
    hinted: bool = False
    teacher: str = ""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities (nats, at temperature 1) of T generated tokens and of the likeliest ones at each place.

    A token is an id of the teacher's tokenizer where the backend tells it, its text otherwise.
    """

    tokens: tuple[int | str, ...]
    logprobs: tuple[float, ...]
    top_tokens: tuple[tuple[int | str, ...], ...]
    top_logprobs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """Raw text, as the teacher wrote it, without the stop string. ``cut``: it ran into ``max_new_tokens``."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    cut: bool = False
    retries: int = 0
    scores: TokenScores | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that came to nothing after all retries; the next run asks again."""

    reason: str
    retries: int = 0


class TextTeacher(Protocol):
    """A live teacher of text. ``identity`` names model and revision, and is part of every key."""

    identity: str

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion | Failure]]:
        """What came of each request, in any order, as soon as it is there, so that it can be journaled.

        Requests are taken as there is room for them: a budget ends them early, and each that was taken comes back.
        Raises TeacherError where asking on is no use (wrong key, model gone).
        """
        ...


class TextTeacherSpec(Component):
    """The recipe's side of a text teacher."""

    knows_answers: ClassVar[bool] = False
    """It repeats gold labels, so that scoring it would say nothing."""
    computes: ClassVar[bool] = True
    """It writes while it is asked, so that its speed means something."""
    manner: ClassVar[frozenset[str]] = frozenset()
    """Fields that say how it is asked, not what it writes: they may change between two runs."""
    tells_ids: ClassVar[bool] = False
    """Log-probabilities that come with its completions are of ids of its tokenizer, and not of texts."""

    licence: str = Field(default="", description="of what it writes, for cards; empty: that of the model where known")

    def members(self) -> Mapping[str, Member]:
        """Teachers that write in its place, by name; none for one that writes itself."""
        return {}

    def content(self) -> dict[str, Any]:
        """All of the section that decides what it writes."""
        return self.model_dump(mode="json", exclude=set(self.manner))

    def check(self, *, chat: bool, sampling: Sampling) -> None:
        """Raises ConfigError where it cannot be had, or cannot do what is asked. Loads no weights, costs nothing.

        Called before anything is written. ``chat``: the prompts are chats.
        """

    def count_tokens(self, prompts: Sequence[Prompt]) -> list[int] | None:
        """Tokens of each prompt as the teacher counts them; None where nobody knows before it is asked."""
        return None

    def max_prompt_tokens(self, sampling: Sampling) -> int | None:
        """The longest prompt that leaves room for a completion; None where nobody knows."""
        return None

    def vocabulary(self) -> dict[str, int]:
        """The words of its tokenizer, of one that tells ids; no weights are read for it."""
        raise NotImplementedError(f"{type(self).__name__} tells no ids")

    @abstractmethod
    def open(self, *, task: Task, sampling: Sampling, seed: int) -> TextTeacher:
        """Connects, or prepares to load at the first question. Heavy packages are imported here."""

    @abstractmethod
    def describe(self) -> TeacherFacts:
        """What tables and cards say of it, read without its weights."""


@dataclass(frozen=True, slots=True)
class TeacherFacts:
    """``parameters`` and ``num_bytes`` (of its weights on disk) are None, texts empty, where nobody can know."""

    name: str
    parameters: int | None = None
    num_bytes: int | None = None
    revision: str = ""
    licence: str = ""


class TensorTeacher(Protocol):
    """A live teacher of signals."""

    def signals(self, batch: Batch) -> Signals | SparseSignals:
        """Its signals at the supervised tokens of ``batch``, without gradient."""
        ...


@runtime_checkable
class LazyTeacher(TensorTeacher, Protocol):
    """One whose logits can wait until they are compared, chunk by chunk."""

    def lazy_signals(self, batch: Batch) -> LazySignals:
        """The same, without logits yet."""
        ...


@runtime_checkable
class DeepTeacher(LazyTeacher, Protocol):
    """One whose layers can be looked at: its signals come with what a ``reading`` wants of them."""

    def show(self, reading: Reading) -> Mapping[Side, Shape]:
        """Prepares to be read so; gives layers and width of each of its sides. Raises ConfigError where it cannot."""
        ...

    def signals(self, batch: Batch, reading: Reading = LOGITS) -> Signals: ...

    def lazy_signals(self, batch: Batch, reading: Reading = LOGITS) -> LazySignals: ...


@runtime_checkable
class StoredTeacher(TensorTeacher, Protocol):
    """One that finds rows on disk, by their keys: batches for it have the column ``keys``."""

    shards: Any


@runtime_checkable
class MovingTeacher(TensorTeacher, Protocol):
    """One that changes while the student learns; every checkpoint has its state."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called in every process after each optimiser step, of which there were ``step`` so far."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that has changed since it was opened."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to what ``state`` gave; raises KeyError where it is that of another model."""
        ...


class TensorTeacherSpec(Component):
    """The recipe's side of a tensor teacher."""

    has_layers: ClassVar[bool] = True
    """It opens as a DeepTeacher, for losses on layers."""
    manner: ClassVar[frozenset[str]] = frozenset({"device"})
    """Fields that say how it is run, not what it says."""
    moves: ClassVar[bool] = False
    """It changes while the student learns."""
    asked_once: ClassVar[bool] = False
    """What it is made of runs once a row, however often the student sees the row."""
    has_head: ClassVar[bool] = False
    """It is one model, whose head makes its logits."""
    knows: ClassVar[frozenset[Target]] = frozenset(TARGETS)
    """Targets of which it can say something."""

    instead_of_mixing: ClassVar[str] = ""
    """What to do where it does not give logits, and an ensemble names it."""

    def check(self) -> None:
        """Raises ConfigError where it cannot be had. Loads no weights; called before anything is written."""

    def may_lack(self, name: str) -> bool:
        """Whether it goes on without this one of those that it is made of."""
        return False

    def without(self, names: Collection[str]) -> TensorTeacherSpec:
        """The same, made of the others alone."""
        return self

    def members(self) -> tuple[str, ...]:
        """Names of the recipe's other teachers that are opened with it, and that it is made of."""
        return ()

    def made_of(self) -> tuple[str, ...]:
        """Names of the recipe's other teachers that it is made of, opened with it or not."""
        return self.members()

    @property
    def gives_logits(self) -> bool:
        """Whether it speaks of all words, at any temperature."""
        return True

    def check_others(self, others: Mapping[str, TensorTeacherSpec]) -> None:
        """Raises ValueError where it cannot be made of those of ``others`` that it names. Reads no file."""
        foreign = [name for name in self.made_of() if others[name].speaks_otherwise()]
        if foreign:
            raise ValueError(
                f"it speaks of the student's words, but {foreign} has a tokenizer of its own. Give each such teacher a "
                "term of its own, with the loss universal_logit"
            )

    def check_rationales(self, teacher: TextTeacherSpec | None, sampling: Sampling | None) -> None:
        """Raises ValueError where it cannot be made of what the recipe's teacher of text writes; reads no file.

        None where the recipe has none.
        """

    def check_loss(self, loss: TermLoss) -> None:
        """Raises ValueError where ``loss`` cannot be computed from what it says. Reads no file."""
        kind = type(loss).model_fields["kind"].default
        if isinstance(loss, FeatureLoss):
            if not self.has_layers:
                raise ValueError("it looks at layers, and the teacher has none of its own. Name a frozen teacher")
            if self.own_view() is not None or self.speaks_otherwise():
                raise ValueError(
                    f"{kind} compares layers at tokens that both models read, but the teacher reads others (`view`, "
                    "`own_tokenizer`). Name a teacher without these"
                )
        elif self.speaks_otherwise() and not loss.any_tokenizer:
            raise ValueError(
                f"{kind} compares word with word, but the teacher has a tokenizer of its own. Use the loss "
                "universal_logit, or remove own_tokenizer if the student has the same tokenizer"
            )

    def placed(self, folder: Path) -> TensorTeacherSpec:
        """With ``folder``, that of the run for this teacher, as the place of its files, where it has any."""
        return self

    def identity(self, others: Mapping[str, TensorTeacherSpec]) -> dict[str, Any]:
        """All that decides its signals but the rows; what stands in the recipe, and of files what is in them."""
        own = self.model_dump(mode="json", exclude=set(self.manner))
        members = {name: others[name].identity(others) for name in self.members()}
        return own | ({"members": members} if members else {})

    def speaks_otherwise(self) -> bool:
        """Whether its words are not the student's: it has a tokenizer of its own."""
        return False

    def own_view(self) -> TeacherView | None:
        """What it sees of an example in its own way; None where it reads what the student reads."""
        return None

    def reader(self, student: Any = None) -> Reader | None:
        """The same with the tokenizer for it. Loads no weights.

        ``student``: a LoadedModel; None while there is none yet, when a teacher that is made of it cannot say either.
        """
        return None

    def sees(self) -> bool | None:
        """Whether its model reads pictures; None where it is the student's, or that of those that it is made of."""
        return None

    @abstractmethod
    def open(self, student: StudentFacts, members: Sequence[TensorTeacher] = ()) -> TensorTeacher:
        """Loads the teacher, and checks that its words are the student's. ``members`` are open, in their order."""

    @abstractmethod
    def num_parameters(self, student_parameters: int) -> int:
        """Its own size, that of its members aside, for the compute of a step; no weights are read for it."""


def with_members(teachers: Mapping[str, TensorTeacherSpec], name: str) -> list[str]:
    """Teacher ``name`` and all that it is made of; one that stands in it twice is named twice.

    Of one that a scheme provides there is the name alone.
    """
    if name not in teachers:
        return [name]
    return [name, *(below for member in teachers[name].made_of() for below in with_members(teachers, member))]
