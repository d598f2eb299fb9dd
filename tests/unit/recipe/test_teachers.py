"""Teachers of a recipe that are made of its other teachers: what is refused when the recipe is read."""

from __future__ import annotations

from typing import Any

import pytest

from distill_llm.core.errors import ConfigError
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe

YAML = """
name: tiny
task: {kind: shop}
student: {model: a/b}
objective: [{name: label, loss: {kind: cross_entropy}, targets: [label]}]
train: {max_steps: 2}
teachers:
  a: {kind: frozen, model: a/b}
  b: {kind: ema, decay: 0.99}
"""


def _recipe(**teachers: str) -> Recipe:
    more = "".join(f"  {name}: {section}\n" for name, section in teachers.items())
    return recipe_from(parse_yaml(YAML + more, "test"), ())


def test_teachers_may_be_made_of_others_wherever_these_stand() -> None:
    recipe = _recipe(all="{kind: ensemble, of: [pair, a]}", pair="{kind: ensemble, of: [a, b], weights: [0.7, 0.3]}")
    members: Any = {name: teacher.members() for name, teacher in recipe.teachers.items()}
    assert members == {"a": (), "b": (), "pair": ("a", "b"), "all": ("pair", "a")}


def test_a_member_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"teachers.*pair: it is made of \['c'\].* other teachers are \['a', 'b'\]"):
        _recipe(pair="{kind: ensemble, of: [a, c]}")


@pytest.mark.parametrize(
    ("teachers", "circle"),
    [
        ({"c": "{kind: ensemble, of: [a, c]}"}, "c > c"),
        ({"c": "{kind: ensemble, of: [a, d]}", "d": "{kind: ensemble, of: [b, c]}"}, "c > d > c"),
        (
            {"top": "{kind: ensemble, of: [a, d]}", "d": "{kind: ensemble, of: [b, e]}"}
            | {"e": "{kind: ensemble, of: [d, a]}"},
            "d > e > d",
        ),
    ],
    ids=["itself", "two", "below"],
)
def test_a_teacher_that_is_made_of_itself_is_refused(teachers: dict[str, str], circle: str) -> None:
    with pytest.raises(ConfigError, match=rf"it is made of itself \({circle}\)\. Take it out"):
        _recipe(**teachers)


def test_a_teacher_without_layers_is_refused_for_a_loss_on_layers() -> None:
    data = parse_yaml(f"{YAML}  pair: {{kind: ensemble, of: [a, b]}}\n", "test")
    data["objective"].append({"name": "hint", "loss": {"kind": "hint"}, "targets": ["label"], "teacher": "pair"})
    with pytest.raises(ConfigError, match=r"objective\.hint\.loss: it looks at layers, and the teacher has none"):
        recipe_from(data, ())
    with pytest.raises(ConfigError, match=r"objective\.hint: hint compares the student with a teacher"):
        recipe_from(data, ["objective.hint.teacher=null"])


@pytest.mark.parametrize(
    ("section", "path"),
    [
        ("{kind: ensemble, of: [a, b], weights: [1]}", r"teachers\.pair.*1 numbers for 2 teachers"),
        ("{kind: ensemble, of: [a, b], weights: [1, -1]}", r"teachers\.pair\.weights.*greater than 0"),
        ("{kind: ema, decay: 1.0}", r"teachers\.pair\.decay.*less than 1"),
        ("{kind: frozen, model: a/b, load_in: 2bit}", r"teachers\.pair\.load_in"),
        ("{kind: frozen, model: a/b, view: {template: q}}", r"view\.template.*must contain \{prompt\} or \{input\}"),
        ("{kind: frozen, model: a/b, view: {hint: '{question}'}}", r"view\.hint.*\{question\} and \{answer\}"),
        ("{kind: frozen, model: a/b, view: {system: s}}", r"`system` is a message of a chat"),
        ("{kind: frozen, model: a/b, align: position}", r"for tokens of another tokenizer. Set own_tokenizer"),
    ],
    ids=["weights", "negative", "decay", "bits", "template", "hint", "system", "align"],
)
def test_errors_name_the_teacher_and_the_key(section: str, path: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){path}"):
        _recipe(pair=section)


def _with_term(loss: str, own: str = "own_tokenizer: true") -> Recipe:
    other = f"  other: {{kind: frozen, model: a/c, {own}}}\n"
    term = f"objective.label={{name: soft, loss: {{kind: {loss}}}, targets: [label], teacher: other}}"
    return recipe_from(parse_yaml(YAML + other, "test"), [term])


def test_only_a_loss_that_compares_no_words_takes_a_tokenizer_of_its_own() -> None:
    with pytest.raises(
        ConfigError, match=r"soft.loss: forward_kl compares word with word, but the teacher has.*universal_"
    ):
        _with_term("forward_kl")
    assert _with_term("universal_logit").teachers["other"].speaks_otherwise()
    assert not _with_term("universal_logit", "dtype: auto").teachers["other"].speaks_otherwise()


def test_an_ensemble_of_other_words_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"pair: it speaks of the student's words, but \['c'\] has a tokenizer of its own"
    ):
        _recipe(c="{kind: frozen, model: a/c, own_tokenizer: true}", pair="{kind: ensemble, of: [a, c]}")
