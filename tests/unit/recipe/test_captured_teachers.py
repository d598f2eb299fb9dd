"""Captured teachers of a recipe: what they are made of has to be asked for, and fits some losses only."""

from __future__ import annotations

import pytest

from distill_llm.core.errors import ConfigError
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe

YAML = """
name: tiny
task: {kind: shop}
rationales: {teacher: {kind: transformers, model: a/b}, sampling: {top_logprobs: 5}}
student: {model: a/b}
teachers: {heard: {kind: captured}, b: {kind: frozen, model: a/b}}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: soft, loss: {kind: forward_kl}, targets: [rationale], teacher: heard}
train: {max_steps: 2}
"""


def _recipe(*overrides: str, text: str = YAML) -> Recipe:
    return recipe_from(parse_yaml(text, "test"), overrides)


@pytest.mark.parametrize(
    "override",
    [
        "objective.soft.loss.temperature=1.0",
        "objective.soft.loss={kind: jensen_shannon}",
        "objective.soft.targets=[rationale, rationale_then_label]",
        "rationales.teacher={kind: vllm, model: a/b}",
    ],
)
def test_what_fits_is_taken(override: str) -> None:
    assert _recipe(override).teachers["heard"].made_of() == ()


SERVER = "rationales.teacher={kind: openai_compatible, model: x, base_url: http://localhost:1/v1}"

SEVERAL = "rationales.teacher={kind: several, of: {a: {teacher: {kind: vllm, model: a/b}}, b: {teacher: {kind: gold}}}}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rationales.sampling.top_logprobs=0", r"teachers\.heard: rationales\.sampling\.top_logprobs is 0"),
        ("rationales.teacher={kind: gold}", r"teachers\.heard: rationales\.teacher of kind gold tells no log"),
        (SERVER, r"teachers\.heard: .* kind openai_compatible .*kind transformers or vllm"),
        ("objective.soft.targets=[label, rationale]", r"objective\.soft\.targets: .*says nothing of \['label'\]"),
        ("objective.soft.loss.temperature=2", r"objective\.soft\.loss: temperature is 2, but captured"),
        ("objective.soft.loss.temperature={start: 1, end: 2}", r"objective\.soft\.loss: temperature is a schedule"),
        ("objective.soft.loss={kind: logit_mse}", r"objective\.soft\.loss: logit_mse cannot be computed"),
        ("objective.soft.loss={kind: universal_logit}", r"objective\.soft\.loss: universal_logit cannot be computed"),
        ("objective.soft.loss={kind: hint}", r"objective\.soft\.loss: .*Name a frozen teacher"),
        ("teachers.kept={kind: cached, of: heard}", r"teachers: kept: heard is a cache already"),
        (
            "teachers.all={kind: ensemble, of: [heard, b]}",
            r"teachers: all: heard keeps some words[^_]*Give it a term of its own",
        ),
        (SEVERAL, r"teachers\.heard: rationales\.teacher is several teachers.*Name a frozen teacher for each"),
    ],
)
def test_what_does_not_is_refused_before_anything_is_loaded(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _recipe(override)


def test_it_needs_rationales() -> None:
    text = YAML.replace("rationales: {", "#", 1)
    with pytest.raises(ConfigError, match=r"teachers\.heard: .* has no `rationales` section"):
        _recipe(text=text)
