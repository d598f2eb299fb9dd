"""Which rationales a student gets to learn from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from distill_llm.core.component import Component


@dataclass(frozen=True, slots=True)
class Chain:
    """One parsed completion, beside what is known of its example."""

    rationale: str
    label: str
    voted_label: str
    agreement: float
    gold_label: str | None
    same: Callable[[str, str], bool]


class Keep(Component):
    """A rule that a rationale must pass; the recipe's list of rules must all pass."""

    @abstractmethod
    def keeps(self, chain: Chain) -> bool: ...


class AgreesWithLabel(Keep):
    """The completion reached the gold label. An example without a gold label passes only by other rules: it fails."""

    kind: Literal["agrees_with_label"] = "agrees_with_label"

    def keeps(self, chain: Chain) -> bool:
        return chain.gold_label is not None and chain.same(chain.label, chain.gold_label)


class AgreesWithVote(Keep):
    """The completion reached the label that most completions of its example reached."""

    kind: Literal["agrees_with_vote"] = "agrees_with_vote"

    def keeps(self, chain: Chain) -> bool:
        return chain.same(chain.label, chain.voted_label)


class MinAgreement(Keep):
    """At least this share of the example's completions reached the voted label."""

    kind: Literal["min_agreement"] = "min_agreement"
    share: float = Field(gt=0, le=1)

    def keeps(self, chain: Chain) -> bool:
        return chain.agreement >= self.share
