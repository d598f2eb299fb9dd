"""Reading recipes: overrides, and errors that name the path, the value, what was expected and the nearest key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from distill_llm.core.errors import ConfigError
from distill_llm.recipe.load import known_keys, load_recipe, overridden, parse_yaml, recipe_from, value_at
from distill_llm.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

YAML = """
name: tiny
task: {kind: shop, products: 20}
rationales: {teacher: {kind: gold}}
student:
  config: {model_type: t5, d_model: 16}
  tokenizer: {kind: words}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}
train: {max_steps: 3}
"""


def _load(*overrides: str, text: str = YAML) -> Recipe:
    return recipe_from(parse_yaml(text, "tiny.yaml"), overrides, source="tiny.yaml")


def _refused(*overrides: str, text: str = YAML) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(*overrides, text=text)
    return str(caught.value)


def _set(value: Any, path: str) -> Any:
    for step in path.split("."):
        value = value[int(step)] if step.isdigit() else getattr(value, step)
    return value


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("seed=5", "seed", 5),
        ("train.max_steps=7", "train.max_steps", 7),
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("train.learning_rate=1E-4", "train.learning_rate", 1e-4),
        ("train.learning_rate=2.5e+0", "train.learning_rate", 2.5),
        ("train.tune=[1e-4, 3e-4]", "train.tune", (1e-4, 3e-4)),
        ("train.gradient_checkpointing=true", "train.gradient_checkpointing", True),
        ("train.report_to=[tensorboard]", "train.report_to", ("tensorboard",)),
        ("name=other-1.2", "name", "other-1.2"),
        ("student.prefixes.label=ask me", "student.prefixes.label", "ask me"),  # a section that was not there
        ("student.prefixes={label: 'a: ', rationale: 'b: '}", "student.prefixes.rationale", "b: "),
        ("objective.rationale.weight=0.25", "objective.1.weight", 0.25),
        ("objective.1.weight=0.25", "objective.1.weight", 0.25),
        ("objective.label.loss.kind=cross_entropy", "objective.0.loss.kind", "cross_entropy"),
        ("objective.0={name: all, loss: {kind: cross_entropy}, targets: [label]}", "objective.0.name", "all"),
        ("evaluate.controls=[]", "evaluate.controls", ()),
        ("student.revision=", "student.revision", ""),  # what a shell leaves of student.revision=""
        ("run_dir=a=b", "run_dir", "a=b"),  # only the first = parts key from value
    ],
)
def test_override_sets_one_value(override: str, path: str, expected: Any) -> None:
    found = _set(_load(override), path)
    assert found == expected
    assert type(found) is type(expected)


def test_override_changes_nothing_else() -> None:
    changed = _load("objective.rationale.weight=0.25").model_dump()
    assert changed["objective"][1].pop("weight") == 0.25
    plain = _load().model_dump()
    plain["objective"][1].pop("weight")
    assert changed == plain


def test_override_null_takes_a_section_away() -> None:
    only_label = "objective=[{name: label, loss: {kind: cross_entropy}, targets: [label]}]"
    assert _load().rationales is not None
    assert _load("rationales=null", only_label).rationales is None


def test_later_override_wins() -> None:
    assert _load("train.max_steps=7", "train.max_steps=8").train.max_steps == 8


def test_value_is_found_where_an_override_would_put_it() -> None:
    data = parse_yaml(YAML, "tiny")
    assert value_at(data, "objective.rationale.name") == value_at(data, "objective.1.name") == "rationale"
    assert value_at(data, "train.max_steps") == data["train"]["max_steps"]
    for path in ("objective.2.name", "objective.labell", "train.max_steps.x", "teachers.big.model"):
        assert value_at(data, path) is None
    assert overridden(data, ["objective.rationale.weight=2", "teachers.big.kind=ema"])["teachers"] == {
        "big": {"kind": "ema"}
    }
    assert data == parse_yaml(YAML, "tiny"), "a copy was changed"


def test_training_has_a_seed_of_its_own() -> None:
    assert (_load().seed, _load().training_seed) == (17, 17)
    assert (_load("seed=3").training_seed, _load("seed=3", "train.seed=0").training_seed) == (3, 0)


def test_name_of_a_term_comes_before_its_number() -> None:
    text = YAML.replace("name: rationale,", "name: r0,")
    assert _load("objective.r0.weight=2", text=text).objective[1].weight == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.max_steps", ["override 'train.max_steps'", "expected key=value"]),
        ("=3", ["override '=3'", "expected key=value"]),
        (
            "objective.labell.weight=2",
            ["objective.labell.weight", "'labell' is not in the list", "'label'"],
        ),
        ("objective.2.weight=2", ["'2' is not in the list", "'label', 'rationale'"]),
        ("seed.deep.er=2", ["override seed.deep.er", "'deep' is looked for in", "no keys"]),
        ("name.x=2", ["override name.x", "'x' cannot be set in 'tiny'"]),
        ("train.tune=[1, 2", ["override 'train.tune=[1, 2'", "not readable YAML"]),
        ("train={max_steps: 1, max_steps: 2}", ["'max_steps' stands twice"]),
    ],
)
def test_wrong_override_says_what_is_wrong(override: str, said: list[str]) -> None:
    message = _refused(override, text=YAML.replace("name: tiny", "name: tiny\nseed: 3"))
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [(YAML + "seed: 1\nseed: 2\n", "seed", 13), (YAML.replace("products: 20", "kind: cqa"), "kind", 3)],
)
def test_key_that_stands_twice_is_refused(text: str, key: str, line: int) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)tiny.yaml is not readable YAML.*'{key}' stands twice.*line {line}"):
        parse_yaml(text, "tiny.yaml")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.max_step=3"], ["train.max_step", "no such key", "is 3", "Did you mean 'max_steps'?"]),
        (["tsk=3"], ["tsk", "is 3", "Did you mean 'task'?"]),
        (["task.product=30"], ["task.product", "is 30", "Did you mean 'products'?"]),
        (["objective.label.wieght=2"], ["objective.label.wieght", "is 2", "Did you mean 'weight'?"]),
        (["student.lora={rnk: 4}"], ["student.lora.rnk", "is 4", "Did you mean 'rank'?"]),
        (["rationales.sampling.temprature=1"], ["rationales.sampling.temprature", "Did you mean 'temperature'?"]),
        (
            ["rationales.prompt.zzz=1"],
            ["rationales.prompt.zzz", "Known keys: exemplars, num_exemplars, style, system, template"],
        ),
        (["rationales.prompt.system=hello"], ["rationales.prompt", "set style: chat"]),
        (["rationales.hint_retry.template=hello"], ["rationales.hint_retry.template", "{question} and {answer}"]),
        (["rationales.budget.max_tokens=-1"], ["rationales.budget.max_tokens", "greater than or equal to 0"]),
        (["rationales.budget.max_cost=1"], ["rationales", "budget.max_cost needs `prices`"]),
        (["rationales.budget.max_request=1"], ["rationales.budget.max_request", "Did you mean 'max_requests'?"]),
        (["rationales.prices.currency=euro"], ["rationales.prices.currency", "should match pattern", "it is 'euro'"]),
        (["rationales.allow_missing=2"], ["rationales.allow_missing", "less than or equal to 1", "it is 2"]),
        (["rationales.sampling.top_logprobs=101"], ["rationales.sampling.top_logprobs", "it is 101"]),
        (["rationales.keep=[{kind: max_rationale_tokens}]"], ["rationales.keep.0.tokens", "required"]),
        (["evaluate.qqq=1"], ["evaluate.qqq", "Known keys: ablations, batch_rows"]),
        (["train.max_steps=-1"], ["train.max_steps", "greater than or equal to 0", "it is -1"]),
        (["train.max_steps=many"], ["train.max_steps", "valid integer", "it is 'many'"]),
        (["train.learning_rate=0"], ["train.learning_rate", "greater than 0", "it is 0"]),
        (["train.optimizer=sgd"], ["train.optimizer", "'adamw' or 'adafactor'", "it is 'sgd'"]),
        (["train.rows_per_batch=7"], ["train", "rows_per_step (64)", "multiple of rows_per_batch (7)"]),
        (["objective.label.targets=[labels]"], ["objective.label.targets.0", "'label'", "it is 'labels'"]),
        (["objective=[]"], ["objective", "at least 1 item", "it is []"]),
        (["objective.rationale.name=label"], ["objective", "same name", "['label', 'label']"]),
        (["name=a b"], ["name", "should match pattern", "it is 'a b'"]),
        (["rationales.prompt.template=hello"], ["rationales.prompt.template", "must contain {prompt}"]),
        (["student.prefixes.label='explain: '"], ["student.prefixes", "same prefix"]),
        (["evaluate.controls=[labels]"], ["evaluate.controls.0", "'labels_same_steps'", "it is 'labels'"]),
    ],
)
def test_error_names_path_value_and_what_was_expected(overrides: list[str], said: list[str]) -> None:
    message = _refused(*overrides)
    head, line = message.split("\n")  # one fault, one line
    assert head == "tiny.yaml is not a valid recipe:"
    assert line.startswith(f"  {said[0]}:")
    for part in said[1:]:
        assert part in line


@pytest.mark.parametrize(
    ("override", "where", "near"),
    [
        ("task.kind=shopp", "task", "shop"),
        ("task.kind=gms8k", "task", "gsm8k"),
        ("rationales.teacher.kind=transformer", "rationales.teacher", "transformers"),
        ("objective.label.loss.kind=cross_entropie", "objective.label.loss", "cross_entropy"),
        ("rationales.keep=[{kind: agree_with_label}]", "rationales.keep.0", "agrees_with_label"),
    ],
)
def test_unknown_kind_names_the_nearest(override: str, where: str, near: str) -> None:
    kind = override.partition("kind")[2].strip("=: ]}")
    message = _refused(override)
    assert f"  {where}: kind '{kind}' is not known; expected one of " in message
    assert message.endswith(f"Did you mean '{near}'?")


def test_missing_kind_is_asked_for() -> None:
    assert "  task: needs a `kind`." in _refused("task={products: 20}")


@pytest.mark.parametrize("key", ["name", "task", "student", "objective", "train"])
def test_required_key(key: str) -> None:
    data = yaml.safe_load(YAML)
    del data[key]
    with pytest.raises(ConfigError, match=rf"^tiny.yaml is not a valid recipe:\n  {key}: this key is required"):
        recipe_from(data, source="tiny.yaml")


def test_every_fault_is_listed() -> None:
    lines = _refused("train.max_steps=-1", "seed=x", "task.kind=shopp").split("\n")[1:]
    assert sorted(line.split(":")[0].strip() for line in lines) == ["seed", "task", "train.max_steps"]


@pytest.mark.parametrize("overrides", [["train.epochs=2"], ["train.max_steps=0"]])
def test_either_max_steps_or_epochs(overrides: list[str]) -> None:
    assert "  train: give either `max_steps` or `epochs`, not both or neither" in _refused(*overrides)


def test_epochs_alone_will_do() -> None:
    assert _load("train.max_steps=0", "train.epochs=1.5").train.epochs == 1.5


@pytest.mark.parametrize("override", ["student.model=a/b", "student.config={}"])
def test_either_model_or_config(override: str) -> None:
    assert "  student: give either `model` (a Hub id or folder) or `config`" in _refused(override)


def test_model_replaces_config_as_the_message_says() -> None:
    student = _load("student.model=a/b", "student.config={}").student
    assert (student.model, student.config) == ("a/b", {})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("student.tokenizer=''", "a fresh model needs a `tokenizer`"),
        ("student.config={d_model: 16}", "`config` needs a `model_type`"),
        ("student.lora={rank: 4}", "`lora` on a fresh model"),
    ],
)
def test_rules_of_a_fresh_model(override: str, said: str) -> None:
    assert said in _refused(override)


SOFT = "objective.label={name: label, loss: {kind: forward_kl}, targets: [label], teacher: bgi}"


def test_unknown_teacher_is_named_with_those_that_there_are() -> None:
    message = _refused(SOFT, "teachers.big={kind: frozen, model: a/b}")
    assert "objective.label.teacher: 'bgi' is not one of ['big']. Add it under `teachers:`" in message


def test_known_teacher_is_accepted() -> None:
    recipe = _load(SOFT.replace("bgi", "big"), "teachers.big={kind: frozen, model: a/b}")
    assert recipe.objective[0].teacher == "big"


def test_teacher_goes_with_the_losses_that_look_at_one() -> None:
    missing = "objective.label={name: label, loss: {kind: forward_kl}, targets: [label]}"
    assert "objective.label: forward_kl compares the student with a teacher" in _refused(missing)
    assert "objective.label: cross_entropy looks at no teacher" in _refused(
        "objective.label.teacher=big", "teachers.big={kind: frozen, model: a/b}"
    )


@pytest.mark.parametrize("target", ["rationale", "rationale_then_label"])
def test_target_that_needs_rationales(target: str) -> None:
    message = _refused("rationales=null", f"objective.rationale.targets=[{target}]")
    assert f"objective.rationale.targets: ['{target}'] need rationales" in message


@pytest.mark.parametrize("label_from", ["teacher", "gold_else_teacher"])
def test_labels_of_a_teacher_need_rationales(label_from: str) -> None:
    message = _refused("rationales=null", f"label_from={label_from}", "objective.rationale.targets=[label]")
    assert f"label_from: {label_from} needs a `rationales` section" in message


def test_hints_explain_gold_labels_and_cannot_go_with_votes() -> None:
    message = _refused("rationales.hint_retry={}", "label_from=teacher")
    assert "rationales.hint_retry explains gold labels, but label_from: teacher learns the votes" in message
    for label_from in ("gold", "gold_else_teacher"):
        assert _load("rationales.hint_retry={}", f"label_from={label_from}").label_from == label_from


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluate.ablations={half: [labl]}", "evaluate.ablations.half: ['labl']; expected some of"),
        ("evaluate.ablations={half: []}", "evaluate.ablations.half: no terms; expected some of"),
        ("evaluate.ablations={student: [label]}", "evaluate.ablations.student: this name is taken"),
        ("evaluate.ablations={labels_same_steps: [label]}", "labels_same_steps: this name is taken"),
    ],
)
def test_wrong_ablation(override: str, said: str) -> None:
    assert said in _refused(override)


def test_no_such_file_says_where_recipes_are() -> None:
    with pytest.raises(ConfigError, match=r"no-such.yaml: there is no such recipe.*recipe list"):
        load_recipe("no-such.yaml")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
def test_a_file_that_is_no_mapping(text: str, tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="expected a mapping with the keys name, task, student, objective, train"):
        load_recipe(path)


def test_recipe_that_came_with_the_package_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = str(RECIPES[0].relative_to(ROOT))
    assert load_recipe(name) == load_recipe(RECIPES[0])


def test_own_file_comes_before_the_package_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = RECIPES[0].relative_to(ROOT)
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(YAML)
    monkeypatch.chdir(tmp_path)
    assert load_recipe(str(name)).name == "tiny"


def test_shown_recipe_loads_to_the_same() -> None:
    recipe = _load("train.tune=[1e-4, 3e-4]", "student.prefixes.label=ask")
    shown = yaml.safe_dump(recipe.model_dump(mode="json"))
    assert recipe_from(parse_yaml(shown, "shown")) == recipe


def test_run_dir_takes_the_name() -> None:
    assert _load().folder == Path("runs/tiny")
    assert _load("run_dir=~/x/{name}/y").folder == Path.home() / "x/tiny/y"


def test_known_keys_go_through_kinds_and_lists() -> None:
    assert {"kind", "temperature"} <= set(known_keys(["objective", "0", "loss", "forward_kl"]))
    assert known_keys(["rationales", "keep", "0", "shortest"]) == ["kind", "chains"]
    assert "batch_rows" in known_keys(["rationales", "teacher", "transformers"])


def test_schema_is_a_json_schema() -> None:
    schema = Recipe.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_schema_accepts_the_recipe(path: Path) -> None:
    data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    jsonschema.Draft202012Validator(Recipe.model_json_schema()).validate(data)


@pytest.mark.parametrize(("key", "value"), [("nmae", "x"), ("task", {"kind": "shopp"}), ("train", {"max_steps": "a"})])
def test_schema_refuses_what_is_wrong(key: str, value: Any) -> None:
    data = yaml.safe_load(YAML) | {key: value}
    assert not jsonschema.Draft202012Validator(Recipe.model_json_schema()).is_valid(data)


def test_published_schema_is_that_of_the_code() -> None:
    published = ROOT / "docs" / "recipe.schema.json"
    assert json.loads(published.read_text(encoding="utf-8")) == Recipe.model_json_schema(), (
        "docs/recipe.schema.json is stale: make schema"
    )
