"""The contract of a payload: what a cache keeps of a teacher's words at one token, and how it is read back.

N supervised tokens, M of them, V vocabulary, D hidden size, R temperatures, S draws.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from distill_llm.core.component import Component
from distill_llm.core.errors import TeacherError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from distill_llm.cache.shards import Columns
    from distill_llm.core.signals import Signals
    from distill_llm.core.sparse import SparseSignals


@dataclass(frozen=True, slots=True)
class Said:
    """What a teacher says of M tokens: what goes into its head, and what makes logits of that.

    ``temperatures`` matter only to payloads that fix them; ``noise`` is that of the payload.
    """

    hidden: Float[Tensor, "M D"]
    make_logits: Callable[[Tensor], Tensor]
    temperatures: Sequence[float] = (1.0,)
    noise: Float[Tensor, "M R S"] | None = None

    def logits(self) -> Float[Tensor, "M V"]:
        return self.make_logits(self.hidden)


@dataclass(frozen=True, slots=True)
class Kept:
    """The columns of N tokens as a cache has them; ``about`` says which tokens, and on which device."""

    columns: Mapping[str, Any]
    about: Signals
    width: int
    temperatures: tuple[float, ...] = (1.0,)


class Payload(Component):
    """What is kept of each token; columns are arrays with one entry a token."""

    gives_logits: ClassVar[bool] = False
    """All words can be had back, so that any loss at any temperature can be computed."""

    @property
    def bfloat16(self) -> tuple[str, ...]:
        """Columns whose two bytes are a bfloat16."""
        return ()

    def noise(self, keys: Sequence[int], counts: Sequence[int], temperatures: int) -> Float[Tensor, "N R S"] | None:
        """Random numbers for the tokens of these rows, row behind row; a row's own depend on its key alone."""
        return None

    @abstractmethod
    def encode(self, said: Said) -> Columns:
        """The columns of M tokens. Raises TeacherError where what goes into the head is NaN."""

    def decode(self, kept: Kept) -> SparseSignals:
        """The teacher's signals of N tokens."""
        raise NotImplementedError(f"{type(self).__name__} gives logits")

    def captured_mass(self, columns: Columns) -> float | None:
        """The probability of what is kept, summed over the tokens; None where that says nothing."""
        return None


def must_be_numbers(values: Tensor) -> None:
    """Raises TeacherError where a teacher's signals are NaN or infinite: a cache of them would be worth nothing."""
    if not bool(values.isfinite().all()):
        raise TeacherError(
            "the teacher's signals are not finite numbers. If it is loaded in float16, try `dtype: bfloat16` or "
            "float32; nothing of this batch was written."
        )
