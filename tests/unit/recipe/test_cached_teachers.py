"""Cached teachers of a recipe: what they can be made of, and which losses can be computed from them."""

from __future__ import annotations

import pytest

from distill_llm.core.errors import ConfigError
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe

YAML = """
name: tiny
task: {kind: shop}
student: {model: a/b}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: soft, loss: LOSS, targets: [label], teacher: TEACHER}
train: {max_steps: 2}
teachers:
  a: {kind: frozen, model: a/b}
  b: {kind: frozen, model: c/d}
  own: {kind: ema}
  both: {kind: ensemble, of: [a, b]}
  mixed: {kind: ensemble, of: [a, own]}
"""
TOP, SAMPLED, HIDDEN = "{kind: top_k}", "{kind: sampled}", "{kind: last_hidden}"


def _recipe(of: str = "a", payload: str = TOP, loss: str = "{kind: forward_kl}", more: str = "") -> Recipe:
    teacher = "all" if more else "kept"
    text = YAML.replace("LOSS", loss).replace("TEACHER", teacher)
    kept = f"  kept: {{kind: cached, of: {of}, payload: {payload}}}\n"
    return recipe_from(parse_yaml(text + kept + more, "test"), ())


@pytest.mark.parametrize(
    ("of", "payload"), [("a", TOP), ("both", TOP), ("both", SAMPLED), ("a", HIDDEN), ("a", "{kind: top_k, k: 5}")]
)
def test_what_stands_still_may_be_cached(of: str, payload: str) -> None:
    spec = _recipe(of, payload).teachers["kept"]
    assert spec.made_of() == (of,)
    assert spec.members() == (), "it is not opened for training"


@pytest.mark.parametrize(
    ("of", "payload", "said"),
    [
        ("c", TOP, r"kept: it is made of \['c'\], but the recipe's other teachers are"),
        ("kept", TOP, r"kept: it is made of itself \(kept > kept\)"),
        ("own", TOP, r"kept: own changes while the student learns"),
        ("mixed", TOP, r"kept: own changes while the student learns"),
        ("both", HIDDEN, r"kept: last_hidden needs the head of one model, and both is made of several"),
    ],
)
def test_what_cannot_be_cached_is_refused(of: str, payload: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"teachers: {said}"):
        _recipe(of, payload)


def test_a_cache_of_a_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"all: kept is a cache already: name the teacher"):
        _recipe(more="  all: {kind: cached, of: kept}\n")


def test_an_ensemble_takes_caches_of_all_words_alone() -> None:
    more = "  all: {kind: ensemble, of: [kept, b]}\n"
    assert _recipe(payload=HIDDEN, more=more).teachers["all"].members() == ("kept", "b")
    with pytest.raises(ConfigError, match=r"teachers: all: kept keeps some words of each token only"):
        _recipe(more=more)


FALLING = "{kind: forward_kl, temperature: {start: 4, end: 1}}"


@pytest.mark.parametrize(
    ("payload", "loss"),
    [
        (TOP, "{kind: jensen_shannon, temperature: 3}"),
        (TOP, "{kind: total_variation}"),
        (SAMPLED, "{kind: forward_kl, temperature: 2}"),
        (HIDDEN, "{kind: logit_mse}"),
        (HIDDEN, FALLING),
    ],
)
def test_losses_that_can_be_computed_are_taken(payload: str, loss: str) -> None:
    assert _recipe(payload=payload, loss=loss).objective[1].teacher == "kept"


@pytest.mark.parametrize(
    ("payload", "loss", "said"),
    [
        (TOP, "{kind: logit_mse}", r"logit_mse cannot be computed from a cache of top_k\. Take a loss between"),
        (SAMPLED, "{kind: reverse_kl}", r"reverse_kl cannot be computed from a cache of sampled\. Take forward_kl"),
        (TOP, FALLING, r"a cache of top_k is written for the temperatures .*last_hidden"),
        (SAMPLED, FALLING, r"a cache of sampled is written for the temperatures"),
    ],
)
def test_losses_that_cannot_are_refused_with_a_way_out(payload: str, loss: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"objective\.soft\.loss: {said}") as caught:
        _recipe(payload=payload, loss=loss)
    assert "last_hidden" in str(caught.value)
