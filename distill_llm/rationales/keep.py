"""Which rationales a student gets to learn from."""

from __future__ import annotations

import functools
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from distill_llm.core.answers import normalise_text
from distill_llm.core.component import Component

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Chain:
    """One completion with a rationale, beside what is known of its example. ``label`` is None where none was read.

    Of a hinted completion, which was told the gold label, the votes are those of the hinted ones.
    """

    rationale: str
    label: str | None
    voted_label: str | None
    agreement: float
    gold_label: str | None
    same: Callable[[str, str], bool]

    def reaches(self, label: str | None) -> bool:
        return self.label is not None and label is not None and self.same(self.label, label)


class Keep(Component):
    """A rule of the recipe's list: of one example's chains that are left, those that stay."""

    def check(self) -> None:
        """Raises ConfigError where what it needs cannot be had. Called before a teacher is asked."""

    @abstractmethod
    def select(self, chains: Sequence[Chain]) -> Sequence[Chain]:
        """Some of ``chains``, the same objects, in their order."""


class KeepEach(Keep):
    """A rule that looks at one chain at a time."""

    @abstractmethod
    def keeps(self, chain: Chain) -> bool: ...

    def select(self, chains: Sequence[Chain]) -> Sequence[Chain]:
        return [chain for chain in chains if self.keeps(chain)]


class Parsable(KeepEach):
    """The completion states an answer that can be read."""

    kind: Literal["parsable"] = "parsable"

    def keeps(self, chain: Chain) -> bool:
        return chain.label is not None


class AgreesWithLabel(KeepEach):
    """The completion reached the gold label. An example without a gold label passes only by other rules: it fails."""

    kind: Literal["agrees_with_label"] = "agrees_with_label"

    def keeps(self, chain: Chain) -> bool:
        return chain.reaches(chain.gold_label)


class Majority(KeepEach):
    """The completion reached the label that most completions of its example reached."""

    kind: Literal["majority"] = "majority"

    def keeps(self, chain: Chain) -> bool:
        return chain.reaches(chain.voted_label)


class MinAgreement(KeepEach):
    """At least this share of the example's completions reached the voted label."""

    kind: Literal["min_agreement"] = "min_agreement"
    share: float = Field(gt=0, le=1)

    def keeps(self, chain: Chain) -> bool:
        return chain.agreement >= self.share


class MaxRationaleTokens(KeepEach):
    """The rationale has at most so many tokens."""

    kind: Literal["max_rationale_tokens"] = "max_rationale_tokens"
    tokens: int = Field(gt=0)
    tokenizer: str = Field(
        default="", description="Hub id or folder, such as the student's; empty: words and punctuation marks"
    )

    def check(self) -> None:
        if self.tokenizer:
            _tokenizer(self.tokenizer)

    def keeps(self, chain: Chain) -> bool:
        if not self.tokenizer:
            return len(_WORD.findall(chain.rationale)) <= self.tokens
        tokenizer = _tokenizer(self.tokenizer)
        return len(tokenizer(chain.rationale, add_special_tokens=False)["input_ids"]) <= self.tokens


class Dedupe(Keep):
    """Of an example's chains with the same text, but for case and space, the first."""

    kind: Literal["dedupe"] = "dedupe"

    def select(self, chains: Sequence[Chain]) -> Sequence[Chain]:
        first: dict[str, Chain] = {}
        for chain in chains:
            first.setdefault(normalise_text(chain.rationale), chain)
        return list(first.values())


class Shortest(Keep):
    """The shortest chains of an example, by words; the earlier one of two that are as long."""

    kind: Literal["shortest"] = "shortest"
    chains: int = Field(default=1, gt=0, description="an example")

    def select(self, chains: Sequence[Chain]) -> Sequence[Chain]:
        by_length = sorted(chains, key=lambda chain: len(_WORD.findall(chain.rationale)))
        return _in_order(chains, by_length[: self.chains])


class Diverse(Keep):
    """Chains of an example that differ most: the first, then each time the one whose words are least like any before.

    Likeness is that of the sets of words (Jaccard). Several different chains a question teach a small student more than
    as many alike (Ho et al. 2023, arXiv:2212.10071, sec. 4).
    """

    kind: Literal["diverse"] = "diverse"
    chains: int = Field(default=2, gt=0, description="an example")

    def select(self, chains: Sequence[Chain]) -> Sequence[Chain]:
        waiting = [(chain, set(_WORD.findall(chain.rationale.lower()))) for chain in chains]
        chosen = waiting[:1]
        del waiting[:1]
        while waiting and len(chosen) < self.chains:
            index = min(range(len(waiting)), key=lambda i: max(_likeness(waiting[i][1], words) for _, words in chosen))
            chosen.append(waiting.pop(index))
        return _in_order(chains, [chain for chain, _ in chosen])


def _likeness(first: set[str], second: set[str]) -> float:
    return len(first & second) / max(1, len(first | second))


def _in_order(chains: Sequence[Chain], chosen: Sequence[Chain]) -> list[Chain]:
    places = {id(chain) for chain in chosen}
    return [chain for chain in chains if id(chain) in places]


@functools.cache
def _tokenizer(source: str) -> Any:
    from distill_llm.models.load import read_tokenizer

    return read_tokenizer(source, where="rationales.keep: max_rationale_tokens.tokenizer")
