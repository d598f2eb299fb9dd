"""Teacher and student with tokenizers of their own: what is compared is how sure they are, not of which word."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distill_llm.losses.base import Divergence

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class UniversalLogit(Divergence):
    """temperature * sum |teacher - student| of probabilities sorted from high to low, 0..2 at temperature 1, no unit.

    Boizard et al. 2024, ULD, arXiv:2402.12030, sec. 3: the smaller vocabulary is filled up with words of probability 0.
    The paper has no temperature: 1 is its loss. It grows with the difference in logits, as total variation does, so
    temperature^1 keeps the size of its gradient. It does not know which word is meant: it needs a loss on hard labels
    beside it, as in the paper.
    """

    kind: Literal["universal_logit"] = "universal_logit"
    order: ClassVar[int] = 1
    any_tokenizer: ClassVar[bool] = True
    takes: ClassVar[frozenset[str]] = frozenset()  # the rest of a top_k is no word, and cannot be sorted among them

    def between(self, log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N W"]) -> Float[Tensor, " N"]:
        from torch.nn.functional import pad

        width = max(log_p.size(-1), log_q.size(-1))
        # Logarithms sort as probabilities do, and one that is -inf gets no gradient through exp.
        p, q = (pad(one.sort(-1, descending=True).values.exp(), (0, width - one.size(-1))) for one in (log_p, log_q))
        return (p - q).abs().sum(-1)
