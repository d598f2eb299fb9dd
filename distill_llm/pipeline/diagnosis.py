"""What an examination of a recipe found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    what: str
    said: str


@dataclass(frozen=True, slots=True)
class TermFacts:
    """A term at step 0, on one micro-batch: its mean loss, and the norm of its weighted gradient."""

    name: str
    loss: float
    gradient_norm: float
    tokens: int


@dataclass(slots=True)
class Diagnosis:
    """All findings; ``rows`` are texts of one micro-batch with the supervised tokens marked."""

    findings: list[Finding] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    terms: list[TermFacts] = field(default_factory=list)

    @property
    def may_run(self) -> bool:
        return all(finding.level != "error" for finding in self.findings)

    def note(self, level: Level, what: str, said: str) -> None:
        self.findings.append(Finding(level, what, said))
