"""The stages that schemes make of a recipe: who is taught by whom, with which weights, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from distill_llm.core.errors import ConfigError
from distill_llm.core.schedule import Schedule
from distill_llm.objective import Objective
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe
from distill_llm.schemes.stages import Stage, outline
from distill_llm.teachers.ensemble import Ensemble

YAML = """
name: tiny
task: {kind: shop}
rationales: {teacher: {kind: gold}}
student:
  config: {model_type: t5, d_model: 16, num_layers: 2}
  tokenizer: {kind: words}
teachers: {big: {kind: frozen, model: a/b}, own: {kind: ema}}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}
  - {name: soft, loss: {kind: forward_kl}, targets: [label], teacher: big, weight: 0.6}
train: {max_steps: 100, rows_per_step: 4, rows_per_batch: 4}
scheme: {kind: assistant_chain, teacher: big}
"""
TWO = "scheme.assistants=[{name: large, config: {d_model: 64}}, {name: middle, config: {d_model: 32}}]"
HINT = "objective.label={name: hint, loss: {kind: hint, layers: uniform}, targets: [label], teacher: big}"
OF_HINTS = (
    "scheme={kind: hint_first}",
    "objective=[{name: label, loss: {kind: cross_entropy}, targets: [label]}, "
    "{name: hint, loss: {kind: hint, layers: uniform}, targets: [label], teacher: big}, "
    "{name: pairs, loss: {kind: hint, layers: [[2, 5]]}, targets: [label], teacher: big}]",
)


def _recipe(*overrides: str) -> Recipe:
    return recipe_from(parse_yaml(YAML, "tiny"), overrides)


def _stages(*overrides: str) -> dict[str, Stage]:
    return {stage.name: stage for stage in _recipe(*overrides).stages}


def _taught(stage: Stage) -> dict[str, tuple[str | None, Any]]:
    return {term.name: (term.teacher, term.weight) for term in stage.terms}


def test_nearest_is_taught_by_the_model_just_above() -> None:
    stages = _stages(TWO)
    assert list(stages) == ["large", "middle", "student"]
    assert [stage.after for stage in stages.values()] == [(), ("large",), ("middle",)]
    assert [_taught(stage)["soft"] for stage in stages.values()] == [("big", 0.6), ("large", 0.6), ("middle", 0.6)]
    assert [stage.student.config["d_model"] for stage in stages.values()] == [64, 32, 16]
    assert stages["student"].student == _recipe(TWO).student
    assert stages["middle"].teachers["large"].model_dump()["model"] == "runs/tiny/models/large/model"
    assert {term.name for term in stages["middle"].terms} == {"label", "rationale", "soft"}


def test_dense_shares_the_weight_among_all_above() -> None:
    stages = _stages(TWO, "scheme.guidance=dense")
    assert _taught(stages["large"])["soft"] == ("big", 0.6)
    assert _taught(stages["middle"]) == {
        "label": (None, 1.0),
        "rationale": (None, 1.0),
        "soft_big": ("big", 0.3),
        "soft_large": ("large", 0.3),
    }
    of_student = {name: of for name, of in _taught(stages["student"]).items() if name.startswith("soft")}
    assert {name: teacher for name, (teacher, _) in of_student.items()} == {
        "soft_big": "big",
        "soft_large": "large",
        "soft_middle": "middle",
    }
    assert sum(weight for _, weight in of_student.values()) == pytest.approx(0.6)
    assert stages["student"].after == ("large", "middle")


def test_a_schedule_of_a_weight_is_shared_at_both_ends() -> None:
    stages = _stages(TWO, "scheme.guidance=dense", "objective.soft.weight={start: 1.0, end: 0.5, shape: cosine}")
    assert _taught(stages["middle"])["soft_big"] == ("big", Schedule(start=0.5, end=0.25, shape="cosine"))


def test_ensemble_is_taught_by_the_mean_of_all_above() -> None:
    stages = _stages(TWO, "scheme.guidance=ensemble")
    assert _taught(stages["large"])["soft"] == ("big", 0.6), "a mean of one is that one"
    assert _taught(stages["student"])["soft"] == ("models_above", 0.6)
    assert stages["student"].teachers["models_above"] == Ensemble(of=("big", "large", "middle"))
    assert stages["student"].after == ("large", "middle")


@pytest.mark.parametrize("guidance", ["nearest", "dense", "ensemble"])
def test_a_chain_without_assistants_is_direct_distillation(guidance: str) -> None:
    (chain,) = _recipe(f"scheme.guidance={guidance}").stages
    (direct,) = _recipe("scheme={kind: step_by_step}").stages
    assert (chain.student, chain.terms, chain.teachers, chain.scheme) == (
        direct.student,
        direct.terms,
        direct.teachers,
        direct.scheme,
    )


def test_terms_of_other_teachers_stay_as_they_are() -> None:
    more = "objective.rationale={name: mean, loss: {kind: forward_kl}, targets: [rationale], teacher: own}"
    for guidance in ("nearest", "dense"):
        for stage in _stages(TWO, more, f"scheme.guidance={guidance}").values():
            assert _taught(stage)["mean"] == ("own", 1.0)
            assert stage.description.startswith("label + mean + soft; taught by ")


def test_an_assistant_may_be_a_pretrained_model_and_so_may_the_student() -> None:
    student = "student={model: c/small, lora: {rank: 4}}"
    stages = _stages(student, "scheme.assistants=[{name: middle, model: c/middle, revision: v2}]")
    assert stages["middle"].student.model_dump(include={"model", "revision", "config"}) == {
        "model": "c/middle",
        "revision": "v2",
        "config": {},
    }
    assert stages["middle"].student.lora == stages["student"].student.lora
    whole = "scheme.assistants=[{name: middle, config: {model_type: t5, d_model: 8}}]"
    made = _stages(student, whole)["middle"].student
    assert (made.model, made.tokenizer, made.lora) == ("", "c/small", None)


def _kept(drop: float, step: int, seed: int = 17) -> dict[str, Any]:
    recipe = _recipe(TWO, "scheme.guidance=dense", f"scheme.drop={drop}")
    stage = recipe.stages[-1]
    drawn = stage.scheme.at_step(Objective(stage.terms).at(0.0), step, seed)
    return {term.teacher: term.weight for term in drawn.terms if term.teacher}


def test_dropping_is_a_function_of_seed_and_step_and_keeps_the_weight() -> None:
    drawn = [_kept(0.5, step) for step in range(200)]
    assert drawn == [_kept(0.5, step) for step in range(200)]
    assert drawn != [_kept(0.5, step, seed=18) for step in range(200)]
    assert all(kept for kept in drawn), "never all"
    assert all(sum(kept.values()) == pytest.approx(0.6) for kept in drawn)
    share = Counter(name for kept in drawn for name in kept)
    assert set(share) == {"big", "large", "middle"}
    # each is kept in half of the draws, of which the eighth without any is drawn again: 4 of 7
    assert all(abs(count / 200 - 4 / 7) < 0.11 for count in share.values())
    assert all(len(_kept(0.0, step)) == 3 for step in range(5))


def test_one_teacher_is_never_dropped() -> None:
    recipe = _recipe(TWO, "scheme.guidance=dense", "scheme.drop=0.9")
    stage = recipe.stages[0]
    objective = Objective(stage.terms).at(0.0)
    assert stage.scheme.kind == "step_by_step"
    assert recipe.scheme.at_step(objective, 3, 17) is objective


def test_what_acts_in_a_stage_holds_no_stage_below_it() -> None:
    """So that a change further down does not train it anew."""
    schemes = [stage.scheme.model_dump() for stage in _recipe(TWO, "scheme.guidance=dense", "scheme.drop=0.5").stages]
    assert [[one["name"] for one in scheme.get("assistants", ())] for scheme in schemes] == [
        [],
        ["large"],
        ["large", "middle"],
    ]


def test_generations_learn_from_the_one_before() -> None:
    stages = _stages("scheme={kind: born_again, generations: 3}")
    assert list(stages) == ["generation_0", "generation_1", "student"]
    assert stages["generation_0"].terms == _recipe().objective
    assert _taught(stages["generation_1"]) == {
        "label": (None, 1.0),
        "rationale": (None, 1.0),
        "previous": ("generation_0", 1.0),
    }
    assert _taught(stages["student"])["previous"] == ("generation_1", 1.0)
    assert [stage.seed_shift for stage in stages.values()] == [2, 1, 0]
    assert len({stage.student for stage in map(_hashable, stages.values())}) == 1


def _hashable(stage: Stage) -> Any:
    return type("Of", (), {"student": stage.student.model_dump_json()})


def test_generations_may_learn_by_terms_of_their_own_alone() -> None:
    own = "{name: soft, loss: {kind: reverse_kl, temperature: 2}, targets: [rationale], teacher: previous}"
    stages = _stages(f"scheme={{kind: born_again, labels: false, terms: [{own}]}}")
    assert _taught(stages["student"]) == {"soft": ("generation_0", 1.0)}


def test_hints_come_first_and_alone() -> None:
    stages = _stages(*OF_HINTS)
    hints, student = stages.values()
    assert [(term.name, term.layers and term.layers.layers) for term in hints.terms] == [
        ("hint", "lower_half"),
        ("pairs", ((2, 5),)),
    ]
    assert [term.name for term in student.terms] == ["label"]
    assert (hints.scored, hints.validated, hints.share_of_steps) == (False, False, 0.25)
    assert (student.student.model, student.student.config) == ("runs/tiny/models/hints/model", {})
    assert (student.after, student.share_of_steps) == (("hints",), 0.75)
    written = _stages(*OF_HINTS, "scheme.layers=as_written")["hints"].terms[0].layers
    assert written is not None
    assert written.layers == "uniform"


def test_an_outline_names_every_stage_and_nothing_of_a_single_one() -> None:
    assert outline(_recipe().stages) == []
    assert outline(_recipe(TWO, "scheme.guidance=ensemble").stages)[1:] == [
        "stage 2 of 3, middle: label + rationale + soft; taught by the mean of big, large",
        "stage 3 of 3, student: label + rationale + soft; taught by the mean of big, large, middle",
    ]
    assert outline(_recipe(*OF_HINTS).stages)[0] == "stage 1 of 2, hints: hint + pairs, alone; 25% of the steps"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["scheme.teacher=bgi"], r"scheme: teacher 'bgi' is not one of \['big', 'own'\]"),
        (["scheme.teacher=own"], "scheme: no term of the objective has `teacher: own`"),
        (["scheme.teacher=own", "objective.soft.teacher=own"], "scheme: teacher 'own' follows the student"),
        ([TWO, "scheme.derived=1"], "scheme: give either `assistants` or `derived`, not both"),
        (["scheme.drop=0.5"], "scheme: `drop` leaves out some of several teachers; guidance: nearest has one"),
        (["scheme.guidance=dense", "scheme.drop=1.0"], r"scheme\.drop: Input should be less than 1"),
        (["scheme.assistants=[{name: a}]"], "assistant 'a': give either `config`"),
        (["scheme.assistants=[{name: big, config: {d_ff: 8}}]"], r"name of a teacher or of a control: \['big'\]"),
        (["scheme.assistants=[{name: student, config: {d_ff: 8}}]"], r"two stages have the same name: \['student'\]"),
        (["student={model: a/b}", "scheme.assistants=[{name: a, config: {d_ff: 8}}]"], "`config` has to be whole"),
        (["student={model: a/b}", "scheme.derived=1"], "`derived` needs a teacher of `kind: frozen` and a student"),
        ([TWO, "scheme.guidance=ensemble", HINT], r"scheme: stage 'middle': objective\.hint\.loss: it looks at layers"),
        (
            [TWO, "scheme.guidance=dense", "objective.rationale.name=soft_big"],
            r"scheme: terms of `dense` guidance have the names of others",
        ),
        (["scheme={kind: born_again, generations: 1}"], r"scheme\.generations: Input should be greater than or equal"),
        (
            ["scheme={kind: born_again, terms: [{name: a, loss: {kind: forward_kl}, targets: [label], teacher: big}]}"],
            r"\['a'\] must have `teacher: previous`",
        ),
        (["scheme={kind: hint_first}"], "scheme: hint_first needs a term on layers in the objective"),
        ([*OF_HINTS, "objective.hint.until=0.5"], r"scheme: the hint stage ends the terms \['hint'\] by itself"),
        (
            [*OF_HINTS, "student={model: a/b, lora: {rank: 2}}"],
            "scheme: the adapters of the hint stage would be merged",
        ),
        ([TWO, "evaluate.ablations={middle: [label]}"], r"evaluate\.ablations\.middle: this name is taken"),
    ],
)
def test_what_makes_no_sense_is_refused_when_the_recipe_loads(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _recipe(*overrides)
