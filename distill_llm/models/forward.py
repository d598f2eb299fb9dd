"""How a batch goes through a model, and where its tokens are in what comes out.

B rows, T positions, N tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill_llm.core.signals import Batch, model_inputs

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Passed:
    """What a model gave back for a batch."""

    outputs: Any

    def at(
        self, states: Float[Tensor, "B T D"], rows: Int[Tensor, " N"], columns: Int[Tensor, " N"]
    ) -> Float[Tensor, "N D"]:
        """Those of ``states``, laid out as outputs are, that belong to the batch's tokens at ``rows``, ``columns``."""
        return states[rows, columns]


def forward(model: Any, batch: Batch, **options: Any) -> Passed:
    """One forward pass. ``model`` is called as it is wrapped, or a gradient's reduction over ranks is skipped."""
    return Passed(model(**model_inputs(batch), **options))
