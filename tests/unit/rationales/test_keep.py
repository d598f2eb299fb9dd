"""Keep rules: each on its own, in order, on hinted chains, and against their definitions."""

from __future__ import annotations

import itertools
import random
import re
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from distill_llm.core.answers import same_answer
from distill_llm.core.component import kinds
from distill_llm.core.errors import ConfigError
from distill_llm.rationales.keep import (
    AgreesWithLabel,
    Chain,
    Dedupe,
    Diverse,
    Keep,
    Majority,
    MaxRationaleTokens,
    MinAgreement,
    Parsable,
    Shortest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from distill_llm.models.load import LoadedModel


def _same(first: str, second: str) -> bool:
    return same_answer("text", first, second)


def _chain(rationale: str = "r", **changes: Any) -> Chain:
    facts: dict[str, Any] = {
        "rationale": rationale, "label": "a", "voted_label": "a", "agreement": 0.75, "gold_label": "a", "same": _same,
    }  # fmt: skip
    return Chain(**(facts | changes))


def _kept(rule: Keep, chains: Sequence[Chain]) -> list[int]:
    """The places of those that stay; a rule gives the very objects back."""
    selected = rule.select(chains)
    return [next(i for i, chain in enumerate(chains) if chain is one) for one in selected]


def test_these_are_the_rules() -> None:
    assert set(kinds(Keep, "distill_llm.rationales")) == {
        "agrees_with_label",
        "dedupe",
        "diverse",
        "majority",
        "max_rationale_tokens",
        "min_agreement",
        "parsable",
        "shortest",
    }


@pytest.mark.parametrize("kind", kinds(Keep, "distill_llm.rationales"))
def test_every_rule_takes_no_chains(kind: str) -> None:
    needed = {"min_agreement": {"share": 0.5}, "max_rationale_tokens": {"tokens": 3}}
    rule = kinds(Keep, "distill_llm.rationales")[kind].model_validate(needed.get(kind, {}))
    assert list(rule.select([])) == []


def test_parsable() -> None:
    assert _kept(Parsable(), [_chain(label=None), _chain(label="z", voted_label=None)]) == [1]


def test_agrees_with_label() -> None:
    chains = [
        _chain(gold_label="A ", voted_label="b"),
        _chain(gold_label="b"),
        _chain(gold_label=None),  # without a gold label nobody can know
        _chain(label=None),
    ]
    assert _kept(AgreesWithLabel(), chains) == [0]


def test_majority() -> None:
    chains = [_chain(gold_label="b"), _chain(label="b"), _chain(label=None), _chain(voted_label=None)]
    assert _kept(Majority(), chains) == [0]
    assert _kept(Majority(), [_chain(label=None, voted_label=None)]) == [], "two unknown labels do not agree"


def test_min_agreement() -> None:
    assert _kept(MinAgreement(share=0.75), [_chain(), _chain(agreement=0.74), _chain(agreement=1.0)]) == [0, 2]
    for share in (0, 1.01):
        with pytest.raises(ValidationError):
            MinAgreement(share=share)


def test_a_hinted_chain_is_judged_by_the_label_that_it_was_told() -> None:
    """Its voted label is the gold one; its agreement is that of the hinted chains."""
    hinted = _chain(voted_label="a", agreement=0.5)
    astray = _chain(label="b", voted_label="a", agreement=0.5)
    for rule in (AgreesWithLabel(), Majority()):
        assert _kept(rule, [hinted, astray]) == [0]
    assert _kept(MinAgreement(share=0.5), [hinted]) == [0]
    assert _kept(MinAgreement(share=0.6), [hinted]) == []


def test_max_rationale_tokens_counts_words_and_marks() -> None:
    texts = ["one two three", "one two three four", "one, two", "one, two.", "3.5", "5 > 3", ""]
    assert [texts[i] for i in _kept(MaxRationaleTokens(tokens=3), [_chain(text) for text in texts])] == [
        "one two three", "one, two", "3.5", "5 > 3", "",
    ]  # fmt: skip


def test_max_rationale_tokens_counts_as_a_tokenizer_does(tmp_path: Path, tiny_t5: Callable[..., LoadedModel]) -> None:
    """The bytes of a tokenizer that knows nothing but bytes, without the end that it puts behind a text."""
    tokenizer = tiny_t5(tokenizer="bytes_bpe", text="").tokenizer
    tokenizer.save_pretrained(tmp_path / "mine")
    texts = ["zqxj", "zqxjk", "éé", "ééé"]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert lengths[0] < lengths[1] < lengths[3], "the tokenizer is to see a difference"
    rule = MaxRationaleTokens(tokens=lengths[0], tokenizer=str(tmp_path / "mine"))
    rule.check()
    kept = _kept(rule, [_chain(text) for text in texts])
    assert kept == [i for i, length in enumerate(lengths) if length <= lengths[0]]
    assert 1 not in kept
    assert _kept(MaxRationaleTokens(tokens=1), [_chain(text) for text in texts]) == [0, 1, 2, 3], "one word each"


def test_a_tokenizer_that_is_not_there_is_said_by_the_check(tmp_path: Path) -> None:
    rule = MaxRationaleTokens(tokens=3, tokenizer=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"rationales\.keep: max_rationale_tokens\.tokenizer"):
        rule.check()


def test_dedupe_keeps_the_first_of_a_kind() -> None:
    texts = ["One and one.", "two", "one  AND\none.", "Two", "one, and one"]
    assert _kept(Dedupe(), [_chain(text) for text in texts]) == [0, 1, 4]


def test_shortest_counts_words_takes_the_earlier_and_keeps_the_order() -> None:
    texts = ["a b c d", "a b", "extraordinarily long", "a b c"]
    chains = [_chain(text) for text in texts]
    assert [_kept(Shortest(chains=n), chains) for n in (1, 2, 3, 9)] == [[1], [1, 2], [1, 2, 3], [0, 1, 2, 3]]


def test_equal_chains_are_told_apart() -> None:
    """Greedy texts may be the same: two equal objects are still two."""
    chains = [_chain("same") for _ in range(3)]
    assert _kept(Diverse(chains=2), chains) == [0, 1]
    assert _kept(Shortest(chains=1), chains) == [0]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def _farthest_first(texts: Sequence[str], number: int) -> list[int]:
    """Naively: of all that are left, the one whose greatest Jaccard likeness to a chosen one is smallest."""
    chosen = [0]
    while len(chosen) < min(number, len(texts)):
        likeness = {}
        for i in set(range(len(texts))) - set(chosen):
            a = _words(texts[i])
            likeness[i] = max(len(a & b) / len(a | b) for b in (_words(texts[j]) for j in chosen))
        chosen.append(min(likeness, key=lambda i: (likeness[i], i)))
    return sorted(chosen)


def test_diverse_is_its_definition() -> None:
    chance = random.Random(0)
    for _ in range(200):
        texts = [" ".join(chance.choices("abcdefg", k=chance.randint(1, 5))) for _ in range(chance.randint(1, 6))]
        for number in (1, 2, 3, 7):
            assert _kept(Diverse(chains=number), [_chain(text) for text in texts]) == _farthest_first(texts, number)


def test_diverse_pairs_are_the_least_alike_of_all_with_the_first() -> None:
    texts = ["half of 8 is 4", "Half of 8 is 4 !", "4 + 4 = 8 so 4", "ask a friend"]
    chains = [_chain(text) for text in texts]
    alike = {j: len(_all(texts[0]) & _all(texts[j])) / len(_all(texts[0]) | _all(texts[j])) for j in (1, 2, 3)}
    assert _kept(Diverse(chains=2), chains) == [0, min(alike, key=lambda j: alike[j])] == [0, 3]


def _all(text: str) -> set[str]:
    return set(text.lower().split())


def test_rules_in_another_order_keep_other_chains() -> None:
    chains = [_chain("short", label="b"), _chain("a longer one"), _chain("the very longest of all")]

    def left(*rules: Keep) -> list[int]:
        rest: Sequence[Chain] = chains
        for rule in rules:
            rest = rule.select(rest)
        return _kept_of(chains, rest)

    assert left(AgreesWithLabel(), Shortest()) == [1]
    assert left(Shortest(), AgreesWithLabel()) == []
    found = {tuple(left(*order)) for order in itertools.permutations((Shortest(), AgreesWithLabel(), Diverse()))}
    assert found == {(1,), ()}


def _kept_of(chains: Sequence[Chain], rest: Sequence[Chain]) -> list[int]:
    return [i for i, chain in enumerate(chains) if any(chain is one for one in rest)]
