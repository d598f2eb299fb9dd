"""Response-based distillation: the student covers what the teacher holds possible."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from distill_llm.core.sparse import SampledSignals, SparseSignals
from distill_llm.losses.base import Divergence, relative_entropy

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from distill_llm.core.signals import Signals


class ForwardKL(Divergence):
    """temperature^2 * KL(teacher || student), nats per token.

    Hinton et al. 2015, arXiv:1503.02531, sec. 2; word by word for language models: Kim & Rush 2016, arXiv:1606.07947,
    sec. 3.1.
    """

    kind: Literal["forward_kl"] = "forward_kl"
    takes: ClassVar[frozenset[str]] = frozenset({"top_k", "sampled"})

    def between(self, log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        return relative_entropy(log_p, log_q)

    def of_sparse(self, student: Signals, teacher: SparseSignals) -> Float[Tensor, " N"]:
        """From drawn words: temperature^2 * (mean of -log q over the draws - the teacher's entropy).

        Unbiased in value and gradient (Sparse Logit Sampling, 2025, arXiv:2503.16870); of one token it may be below 0.
        """
        if not isinstance(teacher, SampledSignals):
            return super().of_sparse(student, teacher)
        from distill_llm.core.word_sums import mean_cross_entropy

        temperature = self.constant_temperature
        word_ids, entropy = teacher.drawn(temperature)
        return temperature**2 * (mean_cross_entropy(student.logits, word_ids, temperature) - entropy)
