"""What the logs show of each term besides its loss: does the student agree with its teacher, and which term pushes.

N supervised tokens, V vocabulary, K terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distill_llm.core.signals import IGNORE_INDEX, OWN, Batch, Signals, aligned_labels
from distill_llm.core.sparse import SparseSignals
from distill_llm.objective import Taught, Term, Watch


class Diagnostics:
    """Counts every step's tokens, and looks closely at the steps that will be logged: to do so at each would cost time.

    All numbers stay on the device until they are asked for.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, Tensor] = {}
        self._step: _Step | None = None
        self._own: Tensor | None = None

    def begin(self, terms: Sequence[Term], counts: Tensor, *, closely: bool) -> Watch | None:
        """A step begins, with ``counts`` [K] tokens in all processes. Gives what is to watch it, if anything is."""
        for term, count in zip(terms, counts, strict=True):
            self._tokens[term.name] = self._tokens.get(term.name, torch.zeros_like(count)) + count
        self._step = _Step(terms, counts.device) if closely else None
        return self._step.watch if self._step is not None else None

    def look_at_own(self, batches: Sequence[Batch]) -> None:
        """Counts rows, those whose text is the student's own, and the tokens of these. In all processes, or none."""
        found = torch.stack([_own(batch) for batch in batches]).sum(0)
        self._own = found if self._own is None else self._own + found

    def values(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What there is to log, which is forgotten then; ``add_up`` sums over processes."""
        if not self._tokens:
            return {}
        counts = torch.stack(list(self._tokens.values())).tolist()
        logs = {f"tokens_{name}": count for name, count in zip(self._tokens, counts, strict=True)}
        if self._step is not None:
            logs |= self._step.values(add_up)
        if self._own is not None:
            rows, own, tokens = add_up(self._own).tolist()
            logs["student_written"] = own / rows
            if own:
                logs["student_written_tokens"] = tokens / own
        self._tokens, self._step, self._own = {}, None, None
        return logs


class _Step:
    """Sums over the tokens of one step, all its micro-batches.

    The terms are given beforehand: every process must add up the same ones, and one may have no token of some.
    """

    def __init__(self, terms: Sequence[Term], device: torch.device):
        self._terms = tuple(terms)
        self._sums = {term.name: torch.zeros(5, device=device) for term in self._terms}

    def watch(self, term: Term, student: Signals, teacher: Taught | None, part: Tensor) -> None:
        """Adds some tokens of a term; ``part`` is what they add to the loss, with its graph."""
        sums = self._sums[term.name]
        if teacher is not None:
            sums[:4] += _beside_teacher(*_of_known(student, teacher))
        if len(self._terms) > 1 and part.requires_grad:
            # The logits are the last that all terms share, and each token has its own: the square over a whole step is
            # the sum over its tokens, and no backward pass of the model is needed.
            (gradient,) = torch.autograd.grad(part, student.logits, retain_graph=True)
            sums[4] += gradient.float().square().sum()

    def values(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Shares and means; one of nothing is left out."""
        sums = add_up(torch.stack(list(self._sums.values()))).tolist()
        norms = [square**0.5 for *_, square in sums]
        logs: dict[str, float] = {}
        for term, (tokens, same, entropy, mass, _), norm in zip(self._terms, sums, norms, strict=True):
            if tokens and not term.loss.any_tokenizer:  # or the same number may be another word
                logs[f"agreement_{term.name}"] = same / tokens
            if tokens:
                logs[f"teacher_entropy_{term.name}"] = entropy / tokens
            if mass:  # of signals that keep the likeliest words alone
                logs[f"captured_mass_{term.name}"] = mass / tokens
            if sum(norms) > 0:
                logs[f"gradient_share_{term.name}"] = norm / sum(norms)
        return logs


def _own(batch: Batch) -> Tensor:
    own = batch["targets"] >= OWN
    tokens = (aligned_labels(batch) != IGNORE_INDEX).sum(1)
    return torch.stack([own.new_tensor(len(own), dtype=torch.long), own.sum(), (tokens * own).sum()])


def _of_known(student: Signals, teacher: Taught) -> tuple[Signals, Taught]:
    """Both at the tokens of which the teacher says something."""
    if teacher.known is None:
        return student, teacher
    return student.where(teacher.known), teacher.where(teacher.known)


@torch.no_grad()
def _beside_teacher(student: Signals, teacher: Taught) -> Tensor:
    """Tokens, those whose likeliest word is the same, the teacher's entropy in nats, over the teacher's words, and the
    probability of those that were kept, 0 where all were."""
    if isinstance(teacher, SparseSignals):
        same = student.narrowed(teacher.width).logits.argmax(-1) == teacher.likeliest()
        entropy, mass = teacher.entropy().sum(), teacher.captured_mass()
        kept = entropy.new_zeros(()) if mass is None else mass.sum()
        return torch.stack([entropy.new_full((), len(same)), same.sum(), entropy, kept])
    logits = teacher.logits.float()
    same = student.logits[:, : logits.size(-1)].argmax(-1) == logits.argmax(-1)
    entropy = torch.special.entr(logits.softmax(-1)).sum()
    return torch.stack([entropy.new_full((), len(same)), same.sum(), entropy, entropy.new_zeros(())])
