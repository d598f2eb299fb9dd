"""What a recipe may say of `mutual` and `self_distill`, and what becomes of each learner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from distill_llm.core.errors import ConfigError
from distill_llm.core.schedule import Schedule
from distill_llm.data.rows import Row
from distill_llm.models.load import LoadedModel
from distill_llm.models.peers import Peers, must_differ
from distill_llm.objective import Objective
from distill_llm.pipeline.arms import Sizes, plan_arms
from distill_llm.pipeline.doctor import examine
from distill_llm.pipeline.rationale_stage import check
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.schemes.mutual import Mutual
from distill_llm.schemes.self_distill import SelfDistill

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distill_llm.recipe.recipe import Recipe

YAML = """
name: tiny
task: {kind: shop, products: 20, train_size: 32, validation_size: 8, test_size: 8}
rationales: {teacher: {kind: gold}}
student:
  config: {model_type: llama, hidden_size: 8, intermediate_size: 16, num_hidden_layers: 2, num_attention_heads: 2}
  tokenizer: {kind: words, vocab_size: 256}
scheme: SCHEME
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}
  - {name: soft, loss: {kind: forward_kl}, targets: [label], teacher: TEACHER, weight: 0.5}
train: {max_steps: 10, rows_per_step: 8, rows_per_batch: 8}
"""
T5 = "student.config={model_type: t5, d_model: 8, d_kv: 4, d_ff: 16, num_layers: 2, num_heads: 2}"


def _mutual(*overrides: str, scheme: str = "{kind: mutual}", teacher: str = "peers") -> Recipe:
    return recipe_from(parse_yaml(YAML.replace("SCHEME", scheme).replace("TEACHER", teacher), "test"), overrides)


def _exits(*overrides: str, scheme: str = "{kind: self_distill, exits: [1]}", teacher: str = "deepest") -> Recipe:
    return _mutual(*overrides, scheme=scheme, teacher=teacher)


def _refused(match: str, build: Callable[..., Recipe], *overrides: str, **changes: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build(*overrides, **changes)


def test_learners_have_names() -> None:
    assert Mutual().learners == ("peer_1", "peer_2")
    two = "{kind: mutual, peers: [{name: wide, config: {model_type: llama}}, {name: pretrained, model: a/b}]}"
    recipe = _mutual("student.tokenizer=a/b", scheme=two)
    assert recipe.scheme.learners == ("peer_1", "wide", "pretrained")
    assert SelfDistill(exits=(1, 3)).learners == ("student", "exit_1", "exit_3")


def test_terms_of_each_learner() -> None:
    objective = Objective(_mutual("objective.soft.weight={start: 1, end: 0.5}").objective)
    three = Mutual(peers=3).for_learners(objective)
    assert [term.name for term in three.of("peer_1").terms] == ["label", "rationale", "soft"]
    assert [term.name for term in three.of("peer_3").terms] == ["label_peer_3", "rationale_peer_3", "soft_peer_3"]
    assert [term.name for term in Mutual(peers=1).for_learners(objective).terms] == ["label", "rationale"]
    exits = SelfDistill(exits=(1,), exit_weight=0.5)
    shared = exits.for_learners(Objective(_exits("objective.soft.weight={start: 1, end: 0.5}").objective))
    assert [term.name for term in shared.of("student").terms] == ["label", "rationale"]
    assert [term.name for term in shared.of("exit_1").terms] == ["label_exit_1", "rationale_exit_1", "soft_exit_1"]
    assert [term.weight for term in shared.of("exit_1").terms] == [0.5, 0.5, Schedule(start=0.5, end=0.25)]


def test_the_best_peer_is_the_student_and_the_first_of_equals() -> None:
    three = Mutual(peers=3)
    assert three.student_among({"peer_1": 0.5, "peer_2": 0.75, "peer_3": 0.75}) == "peer_2"
    assert three.student_among({}) == "peer_1"
    assert SelfDistill().student_among({"student": 0.1, "exit_1": 0.9}) == "student"


@pytest.mark.parametrize("build", [_mutual, _exits])
def test_what_its_teacher_cannot_do_is_refused(build: Callable[..., Recipe]) -> None:
    own = "peers" if build is _mutual else "deepest"
    _refused(f"it provides a teacher {own} itself", build, f"teachers.{own}={{kind: frozen, model: a/b}}")
    _refused("looks at layers, and of `", build, "objective.soft.loss={kind: hint}")
    _refused(rf"'big' is not one of \['{own}'\]", build, "objective.soft.teacher=big")
    ends = [f"objective.{term}.until=0.5" for term in ("label", "rationale")]
    _refused("all terms that go on to the end are against", build, *ends)
    name = "peer_2" if build is _mutual else "exit_1"
    _refused("are names of terms that the scheme makes itself", build, f"objective.rationale.name=label_{name}")
    _refused("all terms that go on to the end are against", build, "evaluate.ablations={copies: [soft]}")
    _refused("this name is taken", build, f"evaluate.ablations={{{name}: [label]}}")
    _refused(rf"'{own}' is not one of \[\]", build, "scheme={kind: step_by_step}")


def test_averages_of_one_student_do_not_go_with_peers() -> None:
    own = "teachers={own: {kind: ema}, other: {kind: frozen, model: a/b}, all: {kind: ensemble, of: [own, other]}}"
    term = "objective.rationale={name: far, loss: {kind: forward_kl}, targets: [rationale], teacher: all}"
    _refused("teacher own is the average of one student, and here several learn", _mutual, own, term)
    _mutual(own)  # it is not asked
    _exits(own, term)


@pytest.mark.parametrize(
    ("peers", "match"),
    [
        ("0", "greater than or equal to 1"),
        ("[{name: a, config: {model_type: t5}}, {name: a, config: {model_type: t5}}]", "names of their own"),
        ("[{name: teacher, config: {model_type: t5}}]", "names of their own"),
        ("[{name: a}]", "peer a: give either `model` or `config`"),
        ("[{name: a, config: {model_type: 7}}]", "peer a, in all else as `student`: `config` needs a `model_type`"),
        ("[{name: a, model: a/b}]", "`student.tokenizer` is trained on the spot"),
    ],
)
def test_peers_that_make_no_sense(peers: str, match: str) -> None:
    _refused(match, _mutual, scheme=f"{{kind: mutual, peers: {peers}}}")


def test_peers_of_two_families_are_refused_before_weights_are_loaded(tmp_path: Path) -> None:
    peers = "{kind: mutual, peers: [{name: other, config: {model_type: t5, d_model: 8}}]}"
    with pytest.raises(ConfigError, match=r"scheme\.peers\.other: it and the student are an encoder-decoder"):
        check(_mutual(f"run_dir={tmp_path}", scheme=peers))


def test_exits_of_a_base_in_few_bits_are_refused() -> None:
    lora = "student={model: a/b, lora: {rank: 2}, load_in: 4bit}"
    _refused("an exit is saved with its adapters merged", _exits, lora)
    _mutual(lora)


def test_exits_are_in_order_and_before_the_last_layer(tmp_path: Path) -> None:
    _refused(r"from the shallowest on: \[1, 2\]", _exits, scheme="{kind: self_distill, exits: [2, 1]}")
    for family in ([], [T5]):
        with pytest.raises(ConfigError, match=r"2 is not before the last of the 2 layers .* numbers from 1 to 1"):
            check(_exits(*family, f"run_dir={tmp_path}", scheme="{kind: self_distill, exits: [1, 2]}"))


def test_one_model_twice_is_refused_unless_dropout_tells_them_apart(tiny_model: Callable[..., LoadedModel]) -> None:
    with pytest.raises(ConfigError, match="peer_1 and peer_2 start from the same weights, and have no dropout"):
        must_differ(Peers({"peer_1": tiny_model(seed=1).model, "peer_2": tiny_model(seed=1).model}, 9))
    must_differ(Peers({"peer_1": tiny_model(seed=1).model, "peer_2": tiny_model(seed=2).model}, 9))
    dropout = "attention_dropout" if tiny_model().model.config.model_type == "llama" else "dropout_rate"
    same = [tiny_model(seed=1, **{dropout: 0.1}).model for _ in range(2)]
    must_differ(Peers({"peer_1": same[0], "peer_2": same[1]}, 9))


def test_peers_start_from_other_weights_and_have_other_sizes(tiny_t5: Callable[..., LoadedModel]) -> None:
    wide = dict(T5_WIDE)
    scheme = Mutual.model_validate({"peers": [{"name": "twin", "config": T5_TINY}, {"name": "wide", "config": wide}]})
    student = tiny_t5(seed=5)
    spec = _mutual(T5).student.model_copy(update={"config": T5_TINY})
    first, second = (scheme.assemble(student, spec, seed=5).model for _ in range(2))
    own, twin, other = (dict(peer.named_parameters()) for peer in first.peers)
    assert first.peers[0] is student.model
    assert not (own["shared.weight"] == twin["shared.weight"]).all()
    assert other["shared.weight"].shape == (len(student.tokenizer), 24)
    again = dict(second.peers[1].named_parameters())
    assert all((weight == again[name]).all() for name, weight in twin.items()), "the seed draws them"
    sizes = [sum(weight.numel() for weight in peer.parameters()) for peer in first.peers]
    assert scheme.extra_parameters(student, spec) == sizes[1] + sizes[2]
    assert Mutual(peers=3).extra_parameters(student, spec) == 2 * sizes[0]


T5_TINY: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 4,
    "feed_forward_proj": "relu",
    "dropout_rate": 0.0,
}
T5_WIDE = T5_TINY | {"d_model": 24}

ROWS = [Row(0, "label", [5] * 10, [1] * 2), Row(0, "rationale", [5] * 10, [1] * 30)]


def test_the_control_of_the_same_compute_pays_for_all() -> None:
    """A student's mean row has 26 tokens, a control's 12; the frozen teacher is run on labels."""
    recipe = _mutual("teachers.big={kind: frozen, model: a/b}", "objective.rationale.teacher=null")
    for beside, passes in ((0, 1), (1000, 2), (500, 1.5)):
        sizes = Sizes({"student": 1000}, {"big": 300}, {"student": beside})
        (control,) = [arm for arm in plan_arms(recipe, ROWS, sizes) if arm.name == "labels_same_compute"]
        assert control.max_steps == round(10 * passes * 26 / 12)


@pytest.mark.parametrize("build", [_mutual, _exits])
@pytest.mark.parametrize("family", [[], [T5]], ids=["llama", "t5"])
def test_doctor_looks_at_each_learner(build: Callable[..., Recipe], family: list[str], tmp_path: Path) -> None:
    diagnosis = examine(build(*family, f"run_dir={tmp_path}"))
    assert diagnosis.may_run, diagnosis.findings
    name = "peer_2" if build is _mutual else "exit_1"
    names = {facts.name for facts in diagnosis.terms}
    assert {"label", "rationale", f"label_{name}", f"rationale_{name}", f"soft_{name}"} <= names
    assert ("soft" in names) == (build is _mutual)
    assert all(facts.tokens and facts.loss < float("inf") for facts in diagnosis.terms)


def test_doctor_says_why_a_student_cannot_be_cut(tmp_path: Path) -> None:
    diagnosis = examine(_exits(f"run_dir={tmp_path}", scheme="{kind: self_distill, exits: [4]}"))
    assert not diagnosis.may_run
    assert "scheme.exits: 4 is not before the last" in diagnosis.findings[-1].said
