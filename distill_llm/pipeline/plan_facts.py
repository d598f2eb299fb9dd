"""What decides the weights of each arm, and what becomes of those that a changed recipe would train otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill_llm.core.errors import ConfigError
from distill_llm.core.files import fingerprint, read_json, write_json
from distill_llm.objective import targets_of
from distill_llm.pipeline.arms import Arm
from distill_llm.pipeline.run_folder import RunFolder, what_differs
from distill_llm.recipe.load import parse_yaml
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.base import with_members

_OF_NO_WEIGHTS = {"workers", "report_to", "keep_checkpoints", "diagnostics"}
_STEPS = {"max_steps", "epochs"}  # an arm has its own number
_SAID = ("role", "description")
"""Parts of a plan that decide nothing."""


def plan_facts(arm: Arm, recipe: Recipe, arms: Sequence[Arm], run: RunFolder) -> dict[str, Any]:
    """What decides the arm's weights, but for the rows and the tokenizer, which all arms share.

    Models of other arms go by their names, so that a run folder may be moved.
    """
    models = {str(run.model(one.name)): one.name for one in arms}
    student = arm.student.model_dump(mode="json", exclude={"tokenizer"})
    student["model"] = models.get(arm.student.model, arm.student.model)
    by_name = {one.name: one for one in arms}
    # A teacher that the scheme provides is in the scheme.
    named = {term.teacher for term in arm.terms if term.teacher is not None} & set(arm.teachers)
    asked = sorted({part for name in named for part in with_members(arm.teachers, name)})
    return {
        "max_steps": arm.max_steps,
        "terms": [term.model_dump(mode="json") for term in arm.terms],
        "target": arm.evaluate_target,
        "student": student,
        "teachers": {
            name: arm.teachers[name].model_dump(mode="json", exclude=set(arm.teachers[name].manner))
            for name in asked
            if name not in arm.after
        },
        "scheme": arm.scheme.model_dump(mode="json"),
        "seed": arm.seed,
        "train": recipe.train.model_dump(mode="json", exclude=_OF_NO_WEIGHTS | _STEPS),
        "after": {name: fingerprint(plan_facts(by_name[name], recipe, arms, run)) for name in arm.after},
    }


def write_plan(arm: Arm, recipe: Recipe, arms: Sequence[Arm], run: RunFolder) -> None:
    facts = plan_facts(arm, recipe, arms, run)
    write_json(run.plan(arm.name), {"role": arm.role, "description": arm.description} | facts)


def settle(recipe: Recipe, arms: Sequence[Arm], run: RunFolder, *, retrain: bool) -> list[str]:
    """Looks at every arm of the folder, and writes the recipe into it; gives the arms that were set aside.

    Raises ConfigError where the folder holds arms that were planned otherwise, or stages that the recipe no longer
    has; with ``retrain`` they are moved to `models/.before` instead.
    """
    _refuse_new_words(recipe, run)
    now = {arm.name: fingerprint(plan_facts(arm, recipe, arms, run)) for arm in arms}
    there = {name: read_json(run.plan(name)) for name in run.planned_arms()}
    stale = [name for name, plan in there.items() if name in now and now[name] != fingerprint(_deciding(plan))]
    gone = [name for name, plan in there.items() if name not in now and plan.get("role") == "assistant"]
    if (stale or gone) and not retrain:
        raise ConfigError(_what_would_be(recipe, run, stale, gone, [name for name in there if name in now]))
    if stale or gone:
        run.set_aside([*stale, *gone])
    run.save_recipe(recipe)
    return [*stale, *gone]


def _refuse_new_words(recipe: Recipe, run: RunFolder) -> None:
    """The tokenizer of the folder was trained on the targets of the recipe that began it."""
    before = parse_yaml(run.recipe.read_text(encoding="utf-8"), str(run.recipe))
    known = {target for term in before["objective"] for target in term["targets"]}
    new = sorted(set(targets_of(recipe.objective)) - known)
    if new and not isinstance(recipe.student.tokenizer, str) and run.planned_arms():
        raise ConfigError(
            f"run_dir: {run.root}: its tokenizer was trained without the target {new}, whose words it may not know. "
            "Choose another folder (run_dir=runs/another)."
        )


def _deciding(plan: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plan.items() if key not in _SAID}


def _what_would_be(
    recipe: Recipe, run: RunFolder, stale: Sequence[str], gone: Sequence[str], there: Sequence[str]
) -> str:
    kept = [name for name in there if name not in stale]
    said = [f"run_dir: {run.root} was filled by another recipe:", *what_differs(recipe, run)]
    if stale:
        said.append(f"These arms were planned otherwise, and would be trained anew: {', '.join(stale)}.")
    if gone:
        said.append(f"These are no stages any more: {', '.join(gone)}.")
    said.append(f"These stay as they are: {', '.join(kept) or 'none'}.")
    said.append(
        "Type the same command with --retrain to move the former to models/.before and train what is needed; or choose "
        "another folder (run_dir=runs/another)."
    )
    return "\n".join(said)
