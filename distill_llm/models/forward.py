"""How a batch goes through a model, and where its tokens are in what comes out.

B rows, T positions, N tokens, D hidden size, S places of all parts of a batch in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from distill_llm.core.features import LOGITS, SIDES, Features, Look, Reading, Side
from distill_llm.core.layout import DECODER, ENCODER, INPUT, PACKED, READS, parts_of, places_in_parts
from distill_llm.core.signals import Batch, Tokens, input_tokens_of, model_inputs, tokens_of
from distill_llm.models.parts import running_in_parts

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


Heads: TypeAlias = "Mapping[str, Sequence[Callable[[Tensor], Tensor]]]"


@dataclass(frozen=True, slots=True)
class Passed:
    """What a model gave back for a batch.

    ``shape`` is that of its tokens: [B, T], or [1, S] where the batch was laid out anew. Then ``places`` says where
    each of the batch's positions, row by row, stands among the S, and ``width`` how many a row has.
    """

    outputs: Any
    shape: tuple[int, int]
    places: Int[Tensor, " BT"] | None = None
    width: int = 0

    def at(
        self, states: Float[Tensor, "B T D"], rows: Int[Tensor, " N"], columns: Int[Tensor, " N"]
    ) -> Float[Tensor, "N D"]:
        """Those of ``states``, laid out as outputs are, that belong to the batch's tokens at ``rows``, ``columns``."""
        if self.places is None:
            return states[rows, columns]
        return states[0].index_select(0, self.places[rows * self.width + columns])

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
        rows, columns = tokens.rows, tokens.columns
        if side == "decoder":
            at_tokens = tuple(self.at(states, rows, columns) for states in hidden)
        else:  # by rows of the batch, whatever its layout
            at_tokens = tuple(states[rows, columns] for states in hidden)
        return Features(
            rows=rows,
            targets=tokens.targets,
            hidden=at_tokens,
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
    """One forward pass. ``model`` is called as it is wrapped, or a gradient's reduction over ranks is skipped.

    A batch with a layout (``core/layout.py``) goes through in it; but not where attention is read, whose maps have the
    size of rows. An encoder's states are there only where they are read, by rows of the batch.
    """
    inputs = model_inputs(batch)
    options: dict[str, Any] = {"use_cache": False}  # or keys and values are copied to a cache that nobody reads
    if reading.hidden:
        options["output_hidden_states"] = True
    if reading.attention:
        options["output_attentions"] = True
    else:
        if PACKED in batch:
            return _packed(model, batch, options)
        if encoders := parts_of(batch, ENCODER):
            decoders, reads = parts_of(batch, DECODER), parts_of(batch, READS)
            with running_in_parts(model, encoders, decoders, reads) as (encoders, decoders):
                outputs = model(**inputs, **options)
            _encoder_by_rows(outputs, encoders, batch)
            return _passed(outputs, decoders, batch["decoder_input_ids"])
    outputs = model(**inputs, **options)
    num_rows, width = batch["decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"].shape
    return Passed(outputs, (num_rows, width))


def _packed(model: Any, batch: Batch, options: dict[str, Any]) -> Passed:
    """All rows in one, without padding: positions that start anew tell the model where a row begins."""
    tokens, places = batch["input_ids"], batch[PACKED]
    positions = places % tokens.size(1)
    outputs = model(input_ids=tokens.flatten()[places][None], position_ids=positions[None], **options)
    return _passed(outputs, [places], tokens)


def _passed(outputs: Any, parts: Sequence[Tensor], tokens: Int[Tensor, "B T"]) -> Passed:
    total = sum(part.numel() for part in parts)
    return Passed(outputs, (1, total), places_in_parts(parts, tokens.numel()), tokens.size(1))


def _encoder_by_rows(outputs: Any, encoders: Sequence[Tensor], batch: Batch) -> None:
    """Lays the encoder's states out like the batch's inputs where they were asked for; elsewhere they are left out."""
    states, last = outputs.get("encoder_hidden_states"), outputs.get("encoder_last_hidden_state")
    if last is not None:
        outputs.encoder_last_hidden_state = None
    if states is None:
        return
    tokens, firsts = batch["input_ids"], batch[INPUT]
    by_row = places_in_parts(encoders, tokens.numel()).view(tokens.shape)[firsts]
    outputs.encoder_hidden_states = tuple(layer[0][by_row] for layer in states)
    outputs.encoder_last_hidden_state = outputs.encoder_hidden_states[-1]
