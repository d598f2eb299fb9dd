"""How a batch goes through a model, and where its tokens are in what comes out.

B rows, T positions, N tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from distill_llm.core.features import LOGITS, SIDES, Features, Look, Reading, Side
from distill_llm.core.signals import Batch, Tokens, input_tokens_of, model_inputs, tokens_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


Heads: TypeAlias = "Mapping[str, Sequence[Callable[[Tensor], Tensor]]]"


@dataclass(frozen=True, slots=True)
class Passed:
    """What a model gave back for a batch."""

    outputs: Any

    def at(
        self, states: Float[Tensor, "B T D"], rows: Int[Tensor, " N"], columns: Int[Tensor, " N"]
    ) -> Float[Tensor, "N D"]:
        """Those of ``states``, laid out as outputs are, that belong to the batch's tokens at ``rows``, ``columns``."""
        return states[rows, columns]

    def features(self, batch: Batch, reading: Reading, heads: Heads) -> dict[Side, Features]:
        """What ``reading`` wanted, for each side; ``heads`` are those on the model, by term."""
        found: dict[Side, Features] = {}
        for side in sorted(reading.sides):
            tokens = tokens_of(batch) if side == "decoder" else input_tokens_of(batch)
            found[side] = replace(self._features(tokens, side, reading), heads=heads)
        return found

    def _features(self, tokens: Tokens, side: Side, reading: Reading) -> Features:
        attention: dict[Look, tuple[Tensor, ...]] = {}
        for look in reading.attention:
            if SIDES[look] == side:
                attention[look] = tuple(maps[tokens.rows, :, tokens.columns] for maps in self._attention(look))
        hidden = self.hidden(side) if side in reading.hidden else ()
        return Features(
            rows=tokens.rows,
            targets=tokens.targets,
            hidden=tuple(self.at(states, tokens.rows, tokens.columns) for states in hidden),
            attention=attention,
            agreement=tokens.agreement,
        )

    def hidden(self, side: Side) -> tuple[Float[Tensor, "B T D"], ...]:
        """Hidden states of all layers, the embeddings first."""
        of_pair = getattr(self.outputs, f"{side}_hidden_states", None)
        return self.outputs.hidden_states if of_pair is None else of_pair

    def _attention(self, look: Look) -> tuple[Tensor, ...]:
        names = {"self": ("decoder_attentions", "attentions"), "cross": ("cross_attentions",)}
        for name in names.get(look, ("encoder_attentions",)):
            found = getattr(self.outputs, name, None)
            if found is not None:
                return found
        raise AssertionError(f"the model shows no {look} attention: was it prepared for it?")


def forward(model: Any, batch: Batch, reading: Reading = LOGITS) -> Passed:
    """One forward pass. ``model`` is called as it is wrapped, or a gradient's reduction over ranks is skipped."""
    options: dict[str, Any] = {}
    if reading.hidden:
        options["output_hidden_states"] = True
    if reading.attention:
        options["output_attentions"] = True
    return Passed(model(**model_inputs(batch), **options))
