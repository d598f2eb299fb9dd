"""How the tokens of a flat batch are laid out for a pass through a model: what stands side by side, and what only once.

B rows, T positions, n rows of a part, w its width, S places of all parts in a row. A layout is columns of the batch
whose shapes say how large each part is, so that the device is never asked. Their entries are places in the flat batch
(row * T + position); -1 is padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

ENCODER, DECODER, READS, PACKED = "encoder_part_", "decoder_part_", "decoder_reads_", "packed_places"
INPUT = "distinct_input"
"""Column [B]: the first row that has the row's input."""


def part_tokens_for(device: str) -> int:
    """Tokens of one part. A processor's cache holds no more (docs/log.md); a GPU wants few and large ones (a guess)."""
    return 2048 if device == "cpu" else 16384


def is_layout(name: str) -> bool:
    """Whether a column of a batch is not one of its rows."""
    return name.startswith((ENCODER, DECODER, READS, PACKED))


def parts_of(batch: dict[str, Any], kind: str) -> list[Tensor]:
    """The parts of a kind, in their order."""
    found = []
    while (column := batch.get(f"{kind}{len(found)}")) is not None:
        found.append(column)
    return found


def parts_layout(
    inputs: Sequence[int],
    input_lengths: Sequence[int],
    target_lengths: Sequence[int],
    targets: Sequence[int],
    *,
    part_tokens: int,
) -> dict[str, Tensor]:
    """The layout of an encoder-decoder's batch: each distinct input once, and targets beside those of about one length.

    ``inputs`` is the column INPUT, which comes with the layout. A decoder's part has rows of one target; what it reads
    of the encoder are places among those of all encoder parts, one behind the other. Empty where nothing is gained.
    """
    import torch

    distinct = sorted(set(inputs))
    encoders = list(_split(distinct, (input_lengths,), part_tokens))
    decoders = [
        part
        for target in sorted(set(targets))
        for part in _split(
            [row for row, own in enumerate(targets) if own == target], (target_lengths, input_lengths), part_tokens
        )
    ]
    if len(distinct) == len(inputs) and len(encoders) == len(decoders) == 1:
        return {}
    columns: dict[str, Tensor] = {INPUT: torch.tensor(inputs)}
    begins: dict[int, int] = {}
    offset, stride = 0, max(input_lengths)
    for number, part in enumerate(encoders):
        columns[f"{ENCODER}{number}"] = places = _ranges([row * stride for row in part], part, input_lengths)
        begins |= {row: offset + index * places.size(1) for index, row in enumerate(part)}
        offset += places.numel()
    stride = max(target_lengths)
    for number, part in enumerate(decoders):
        columns[f"{DECODER}{number}"] = _ranges([row * stride for row in part], part, target_lengths)
        columns[f"{READS}{number}"] = _ranges([begins[inputs[row]] for row in part], part, input_lengths)
    return columns


def packed_layout(lengths: Sequence[int]) -> dict[str, Tensor]:
    """The layout of a decoder-only model's batch: all rows in one, without padding."""
    import torch

    own = torch.tensor(lengths)[:, None]
    steps = torch.arange(max(lengths))
    return {PACKED: (torch.arange(len(lengths))[:, None] * len(steps) + steps)[steps < own]}


def places_in_parts(parts: Sequence[Tensor], size: int) -> Int[Tensor, " size"]:
    """Where each of the ``size`` places of a flat batch went among those of all parts; 0 for padding."""
    import torch

    flat = torch.cat([part.flatten() for part in parts])
    found = flat.new_zeros(size + 1)
    found[flat.where(flat >= 0, size)] = torch.arange(len(flat), device=flat.device)
    return found[:size]


def _split(rows: list[int], lengths: Sequence[Sequence[int]], part_tokens: int) -> Iterator[list[int]]:
    """Halves rows where they differ most in length, until a part has no more than so many tokens with its padding."""
    widths = [max(own[row] for row in rows) for own in lengths]
    if len(rows) == 1 or len(rows) * sum(widths) <= part_tokens:
        yield rows
        return
    padding = [len(rows) * width - sum(own[row] for row in rows) for own, width in zip(lengths, widths, strict=True)]
    worst = lengths[padding.index(max(padding))]
    rows = sorted(rows, key=lambda row: worst[row])
    middle = len(rows) // 2
    yield from _split(rows[:middle], lengths, part_tokens)
    yield from _split(rows[middle:], lengths, part_tokens)


def _ranges(begins: Sequence[int], rows: Sequence[int], lengths: Sequence[int]) -> Int[Tensor, "n w"]:
    import torch

    own = torch.tensor([lengths[row] for row in rows])[:, None]
    steps = torch.arange(int(own.max()))
    return (torch.tensor(begins)[:, None] + steps).where(steps < own, -1)
