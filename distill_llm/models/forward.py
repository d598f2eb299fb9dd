"""How a batch goes through a model, and where its tokens are in what comes out.

B rows, T positions, N tokens, D hidden size, S places of all parts of a batch in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill_llm.core.layout import DECODER, ENCODER, INPUT, PACKED, READS, parts_of, places_in_parts
from distill_llm.core.signals import Batch, model_inputs
from distill_llm.models.parts import running_in_parts

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


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


def forward(model: Any, batch: Batch, **options: Any) -> Passed:
    """One forward pass. ``model`` is called as it is wrapped, or a gradient's reduction over ranks is skipped.

    A batch with a layout (``core/layout.py``) goes through in it; but not where attention maps are asked for, which
    have the size of rows. The encoder's states are then there with ``output_hidden_states`` only, by rows of the batch.
    """
    inputs = model_inputs(batch)
    options = {"use_cache": False} | options  # or keys and values would be copied to a cache that nobody reads
    if not options.get("output_attentions"):
        if PACKED in batch:
            return _packed(model, batch, options)
        if encoders := parts_of(batch, ENCODER):
            decoders, reads = parts_of(batch, DECODER), parts_of(batch, READS)
            with running_in_parts(model, encoders, decoders, reads) as (encoders, decoders):
                outputs = model(**inputs, **options)
            _encoder_by_rows(outputs, encoders, batch)
            return _passed(outputs, decoders, batch["decoder_input_ids"])
    num_rows, width = batch["labels"].shape
    return Passed(model(**inputs, **options), (num_rows, width))


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
