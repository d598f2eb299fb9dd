"""Words drawn from a teacher's distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill_llm.cache.payload import Kept, Payload, Said, must_be_numbers

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from distill_llm.cache.shards import Columns
    from distill_llm.core.sparse import SparseSignals


class Sampled(Payload):
    """Some words drawn from the teacher's distribution at the term's temperature, with repeats, and its entropy there.

    Sparse Logit Sampling, 2025, arXiv:2503.16870, "random sampling knowledge distillation": the mean of -log q over
    the draws is an unbiased estimate of the cross-entropy with the teacher, and so is its gradient. Draws depend on
    the row alone: an epoch later they are the same.
    """

    kind: Literal["sampled"] = "sampled"
    samples: int = Field(default=12, gt=0, le=1024, description="words drawn for each token")

    def noise(self, keys: Sequence[int], counts: Sequence[int], temperatures: int) -> Float[Tensor, "N R S"] | None:
        import torch

        made = torch.Generator()
        each = [
            torch.rand((count, temperatures, self.samples), generator=made.manual_seed(key), dtype=torch.float64)
            for key, count in zip(keys, counts, strict=True)
        ]
        return torch.cat(each)

    def encode(self, said: Said) -> Columns:
        import torch

        from distill_llm.cache.packing import bits_for, pack, pack_logs

        assert said.noise is not None
        logits = said.logits().float()
        logits = logits.cpu() if logits.device.type == "mps" else logits  # which has no float64
        ids, entropies = [], []
        for number, temperature in enumerate(said.temperatures):
            # In float64: the rounding of a sum over a hundred thousand words would favour the last ones.
            p = (logits.double() / temperature).softmax(-1)
            entropies.append(torch.special.entr(p).sum(-1))
            sums = p.cumsum(-1)
            drawn = said.noise[:, number].to(sums.device) * sums[:, -1:]
            ids.append(torch.searchsorted(sums, drawn, right=True).clamp_max(logits.size(-1) - 1))
        must_be_numbers(entropies[0])
        ids.append(logits.argmax(-1, keepdim=True))
        return {
            "word_ids": pack(torch.cat(ids, -1).cpu().numpy(), bits_for(logits.size(-1))),
            "entropies": pack_logs(-torch.stack(entropies, -1).cpu().numpy()),
        }

    def decode(self, kept: Kept) -> SparseSignals:
        import torch

        from distill_llm.cache.packing import bits_for, unpack, unpack_logs
        from distill_llm.core.sparse import SampledSignals

        home, number = kept.about.token_ids.device, len(kept.temperatures)
        count = number * self.samples + 1
        packed = torch.from_numpy(unpack(kept.columns["word_ids"], bits_for(kept.width), count)).to(home)
        return SampledSignals(
            token_ids=kept.about.token_ids,
            targets=kept.about.targets,
            width=kept.width,
            temperatures=kept.temperatures,
            word_ids=packed[:, :-1].unflatten(1, (number, self.samples)),
            entropies=torch.from_numpy(-unpack_logs(kept.columns["entropies"])).to(home),
            best=packed[:, -1],
        )
