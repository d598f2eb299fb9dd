"""Numbers in few bits: words of a vocabulary side by side, logarithms in fixed point.

N tokens, K numbers each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"

NATS = 2048
"""Steps of a nat: half a step is 0.02% of a probability."""
ODDS = 1024
"""Steps of a nat of log-odds, which may be as far below 0 as above."""
_NEVER = 0xFFFF
_SPARE = 3  # a number is read from four bytes at once, and the last ones have to be there


def bits_for(width: int) -> int:
    """Bits that a word's number needs in a vocabulary of ``width`` words."""
    return max(1, (width - 1).bit_length())


def pack(numbers: Array, bits: int) -> Array:
    """Whole numbers below 2**bits [N K], as bytes: ``bits`` bits each, lowest bit first, the last byte filled up."""
    import numpy as np

    spread = (numbers[..., None].astype(np.uint32) >> np.arange(bits, dtype=np.uint32)) & 1
    return np.packbits(spread.reshape(len(numbers), -1).astype(np.uint8), axis=-1, bitorder="little")


def unpack(packed: Array, bits: int, count: int) -> Array:
    """What ``pack`` was given: [N count], int64. ``bits`` is 25 at most."""
    import numpy as np

    assert bits <= 25, "a number and the bits in front of it have to fit four bytes"
    padded = np.pad(packed, ((0, 0), (0, _SPARE)))
    first, shift = np.divmod(np.arange(count) * bits, 8)
    four = sum(padded[:, first + byte].astype(np.uint32) << np.uint32(8 * byte) for byte in range(4))
    return ((four >> shift.astype(np.uint32)) & np.uint32(2**bits - 1)).astype(np.int64)


def pack_logs(logs: Array) -> Array:
    """Logarithms of probabilities in two bytes, in steps of 1/2,048 nat. Below -32 they become -32, but for -inf."""
    import numpy as np

    steps = np.rint(-np.maximum(logs, -1e6).astype(np.float64) * NATS).clip(0, _NEVER - 1)
    return np.where(np.isneginf(logs), _NEVER, steps).astype(np.uint16)


def unpack_logs(packed: Array) -> Array:
    import numpy as np

    logs = packed.astype(np.float32) / -NATS
    logs[packed == _NEVER] = -np.inf
    return logs


def pack_odds(odds: Array) -> Array:
    """Log-odds in two bytes, in steps of 1/1,024 nat. What is beyond -32 or 32 becomes that, but for -inf."""
    import numpy as np

    steps = np.rint(np.maximum(odds, -1e6).astype(np.float64) * ODDS).clip(-32 * ODDS + 1, 32 * ODDS - 1)
    return np.where(np.isneginf(odds), 0, steps + 32 * ODDS).astype(np.uint16)


def unpack_odds(packed: Array) -> Array:
    import numpy as np

    odds = packed.astype(np.float32) / ODDS - 32
    odds[packed == 0] = -np.inf
    return odds
