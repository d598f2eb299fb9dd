"""Log-probabilities that came with a teacher's text, as the columns of a top_k cache.

T tokens that the teacher wrote, L label tokens of a row, K likeliest words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill_llm.cache.packing import bits_for, pack, pack_logs, pack_odds

if TYPE_CHECKING:
    from distill_llm.cache.shards import Array, Columns

SMALLEST_REST = 1e-6
"""Log-probabilities are kept to six decimals: what they leave for all other words is not known any better."""


def captured_columns(top_words: Array, log_probs: Array, places: Sequence[int], *, width: int) -> Columns:
    """The columns of a row's L tokens, from ``top_words`` and ``log_probs`` [T K], NaN where fewer were told.

    ``places``: which of the T tokens stands at each of the row's; -1 for none. Such a token is not ``known``, and
    neither is one with a word beyond ``width``. Nothing is renormalised: the rest is 1 minus the sum.
    """
    import numpy as np

    at = np.asarray(places, np.int64)
    words, logs = top_words[at], log_probs[at].astype(np.float64)
    known = (at >= 0) & ~np.isnan(logs).any(-1) & (words >= 0).all(-1) & (words < width).all(-1)
    k = words.shape[-1]
    words = np.where(known[:, None], words, np.arange(k))
    logs = np.where(known[:, None], logs, -np.log(k + 1.0))
    rest = (1 - np.exp(logs).sum(-1)).clip(SMALLEST_REST, 1 - SMALLEST_REST)
    odds = np.full(rest.shape, -np.inf) if k == width else np.log(rest) - np.log1p(-rest)
    return {
        "word_ids": pack(words, bits_for(width)),
        "log_probs": pack_logs(logs),
        "log_odds": pack_odds(odds[:, None]),
        "known": known.astype(np.uint8),
    }
