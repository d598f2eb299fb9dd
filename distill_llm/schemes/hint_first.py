"""Hints first: the student's lower half learns from the teacher's layers, then all of it from everything else."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from distill_llm.losses.layers import FeatureLoss
from distill_llm.objective import Term
from distill_llm.schemes.base import Scheme
from distill_llm.schemes.stages import STUDENT, Sections, Stage, begun_by, describe
from distill_llm.schemes.step_by_step import StepByStep

HINTS = "hints"


class HintFirst(Scheme):
    """FitNets (Romero et al. 2015, arXiv:1412.6550, sec. 2.3 and algorithm 1): two stages of one student.

    The first trains on the objective's terms on layers alone; the second starts from its weights, with all other
    terms. FitNets takes one layer, in the middle; `lower_half` takes every layer up to there.
    """

    kind: Literal["hint_first"] = "hint_first"
    share_of_steps: float = Field(
        default=0.25, gt=0, lt=1, description="of the recipe's steps, for the hints; the others have the rest"
    )
    layers: Literal["lower_half", "as_written"] = Field(
        default="lower_half",
        description="lower_half: terms whose `layers` are a word (`last`, `uniform`) look at the student's lower half; "
        "pairs stay as they are",
    )

    def stages(self, sections: Sections) -> tuple[Stage, ...]:
        hints = tuple(self._hint(term) for term in sections.objective if term.layers is not None)
        others = tuple(term for term in sections.objective if term.layers is None)
        _check(sections, hints, others)
        return (
            Stage(
                HINTS,
                f"{describe(hints)}, alone",
                sections.student,
                sections.teachers,
                hints,
                StepByStep(),
                share_of_steps=self.share_of_steps,
                scored=False,
                validated=False,
            ),
            Stage(
                STUDENT,
                f"{describe(others)}, after {describe(hints)}",
                begun_by(sections.student, sections.model_of(HINTS)),
                sections.teachers,
                others,
                StepByStep(),
                after=(HINTS,),
                share_of_steps=1 - self.share_of_steps,
            ),
        )

    def alone(self) -> Scheme:
        """All terms at once."""
        return StepByStep()

    def _hint(self, term: Term) -> Term:
        loss = term.layers
        assert isinstance(loss, FeatureLoss)
        if self.layers == "as_written" or not isinstance(loss.layers, str):
            return term
        return term.model_copy(update={"loss": loss.model_copy(update={"layers": "lower_half"})})


def _check(sections: Sections, hints: tuple[Term, ...], others: tuple[Term, ...]) -> None:
    if not hints:
        raise ValueError("hint_first needs a term on layers in the objective, such as {loss: {kind: hint}}")
    if not others:
        raise ValueError("hint_first needs a term that is not on layers: after the hints, nothing would be learned")
    ended = [term.name for term in hints if term.until < 1]
    if ended:
        raise ValueError(f"the hint stage ends the terms {ended} by itself: remove `until`, and set `share_of_steps`")
    if sections.student.lora is not None:
        raise ValueError(
            "the adapters of the hint stage would be merged into weights that the student's own adapters do not know. "
            "Remove `student.lora`, or use the scheme step_by_step with `until` on the hints"
        )
