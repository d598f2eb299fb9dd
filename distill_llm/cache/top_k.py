"""The likeliest words of a teacher, and the mass of all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill_llm.cache.payload import Kept, Payload, Said, must_be_numbers

if TYPE_CHECKING:
    from distill_llm.cache.shards import Columns
    from distill_llm.core.sparse import SparseSignals


class TopK(Payload):
    """The k likeliest words with their log-probabilities, and the mass of all others as one word more.

    Losses compare teacher and student on these k + 1 words: no more than on all words, and the same where k is the
    whole vocabulary. Renormalising over the k words instead would teach the student that nothing else can be said
    (arXiv:2503.16870, sec. 3).
    """

    kind: Literal["top_k"] = "top_k"
    k: int = Field(default=32, gt=0, le=4096, description="words of each token")

    def encode(self, said: Said) -> Columns:
        import torch

        from distill_llm.cache.packing import bits_for, pack, pack_logs, pack_odds

        logits = said.logits().float()
        width = logits.size(-1)
        top = logits.topk(min(self.k, width))
        log_probs = top.values - logits.logsumexp(-1, keepdim=True)
        must_be_numbers(log_probs[:, 0])
        others = logits.scatter(-1, top.indices, -torch.inf)
        odds = [(others / one).logsumexp(-1) - (top.values / one).logsumexp(-1) for one in said.temperatures]
        return {
            "word_ids": pack(top.indices.cpu().numpy(), bits_for(width)),
            "log_probs": pack_logs(log_probs.cpu().numpy()),
            "log_odds": pack_odds(torch.stack(odds, -1).cpu().numpy()),
        }

    def decode(self, kept: Kept) -> SparseSignals:
        import torch

        from distill_llm.cache.packing import bits_for, unpack, unpack_logs, unpack_odds
        from distill_llm.core.sparse import TopSignals

        home = kept.about.token_ids.device
        known = kept.columns.get("known")
        ids = unpack(kept.columns["word_ids"], bits_for(kept.width), min(self.k, kept.width))
        return TopSignals(
            token_ids=kept.about.token_ids,
            targets=kept.about.targets,
            width=kept.width,
            temperatures=kept.temperatures,
            word_ids=torch.from_numpy(ids).to(home),
            log_probs=torch.from_numpy(unpack_logs(kept.columns["log_probs"])).to(home),
            log_odds=torch.from_numpy(unpack_odds(kept.columns["log_odds"])).to(home),
            known=None if known is None else torch.from_numpy(known).to(home, torch.bool),
        )

    def captured_mass(self, columns: Columns) -> float | None:
        import numpy as np

        from distill_llm.cache.packing import unpack_logs

        return float(np.exp(unpack_logs(columns["log_probs"]).astype(np.float64)).sum())
