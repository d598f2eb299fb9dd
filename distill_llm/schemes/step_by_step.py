"""Distilling step by step (Hsieh et al. 2023, arXiv:2305.02301): label and rationale as two tasks of one student."""

from __future__ import annotations

from typing import Literal

from distill_llm.schemes.base import Scheme


class StepByStep(Scheme):
    """Every row is its own task, told apart by its prefix; the objective weighs them. The usual hooks suffice."""

    kind: Literal["step_by_step"] = "step_by_step"
