"""A run's rationale data set as a data set of the Hub: its card, and the way there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import ConfigError
from distill_llm.core.files import read_json, write_text
from distill_llm.hub.rationale_card import MemberFacts, RationaleCardFacts, SplitFacts, rationale_card
from distill_llm.pipeline.run_folder import RunFolder, open_run
from distill_llm.rationales.dataset import COLUMNS
from distill_llm.rationales.prompts import make_prompter
from distill_llm.rationales.spec import RationaleSpec
from distill_llm.recipe.recipe import Recipe

if TYPE_CHECKING:
    from distill_llm.hub.upload import Pushed, Upload


def write_card(recipe: Recipe, run: RunFolder, *, repo_id: str = "", licence: str = "") -> None:
    """The README of the run's rationales; ``repo_id`` is where they will be loaded from, by default their folder."""
    write_text(run.rationale_card, rationale_card(_facts(recipe, run, repo_id or str(run.rationale_folder), licence)))


def plan_push(run_dir: str | Path) -> tuple[RunFolder, Recipe, tuple[Upload, ...]]:
    """What pushing a run's rationales would send: the card, the Parquet files, the funnel. Never the journal."""
    from distill_llm.hub.upload import plan_upload

    run, recipe = open_run(run_dir)
    if recipe.rationales is None or not run.rationales_made_of.exists():
        raise ConfigError(
            f"{run_dir}: there is no finished rationale data set. First type: distill-llm generate-rationales "
            f"{run.recipe}"
        )
    splits = [run.rationales(split) for split in ("train", "validation", "test") if run.rationales(split).exists()]
    files = [run.rationale_card, *splits, run.funnel]
    return run, recipe, plan_upload(run.rationale_folder, [path.relative_to(run.rationale_folder) for path in files])


def push_rationales(run_dir: str | Path, repo_id: str, *, private: bool = True, licence: str = "") -> Pushed:
    """Sends a run's rationale data set to the Hub in one commit; what is there already is not sent again.

    ``licence`` is the one that you give the data set: its inputs have that of the task's data, its rationales are
    bound by that of the teacher. Raises ConfigError for a wrong name or token, StorageError without a network.
    """
    from distill_llm.hub.upload import push

    run, recipe, files = plan_push(run_dir)
    write_card(recipe, run, repo_id=repo_id, licence=licence)
    return push(
        {upload.path_in_repo: upload.file for upload in files},
        repo_id=repo_id,
        repo_type="dataset",
        private=private,
        message=f"Rationales of {recipe.name}",
    )


def licence_warnings(recipe: Recipe) -> list[str]:
    """What the licences of teacher and data forbid or leave open, a sentence each."""
    from distill_llm.hub.licences import data_restriction, teacher_restriction

    voices = recipe.rationales.voices if recipe.rationales is not None else ()
    known = [voice.describe() for voice in voices if voice.votes]
    found = [teacher_restriction(facts.name, facts.licence) for facts in known]
    return [warning for warning in (*found, data_restriction(type(recipe.task).licence)) if warning]


def public_task(recipe: Recipe) -> tuple[str, str]:
    """The task's name on a card, and its data set on the Hub; "" where the data lies on this machine."""
    kind, data = type(recipe.task).model_fields["kind"].default, getattr(recipe.task, "data", "")
    local = not isinstance(data, str) or Path(data).expanduser().exists()
    return recipe.name if kind == "jsonl" else kind, "" if local else data


def _facts(recipe: Recipe, run: RunFolder, repo_id: str, licence: str) -> RationaleCardFacts:
    from distill_llm import __version__

    assert recipe.rationales is not None
    spec, teacher = recipe.rationales, recipe.rationales.teacher.describe()
    funnel, report = read_json(run.funnel), read_json(run.spent)
    spent = report["total"]
    prompter = make_prompter(spec.prompt)
    task, data = public_task(recipe)
    return RationaleCardFacts(
        repo_id=repo_id,
        task=task,
        task_data=data,
        task_licence=type(recipe.task).licence,
        teacher=_public_name(teacher.name),
        teacher_revision=teacher.revision,
        teacher_licence=teacher.licence,
        from_data=spec.knows_answers,
        splits={split: _split_facts(run.rationales(split).name, counts) for split, counts in funnel.items()},
        columns={name: text for name, text in COLUMNS.items() if name != "logprobs" or spec.keeps_logprobs},
        command=f"distill-llm generate-rationales {recipe.name}.yaml",
        version=__version__,
        licence=licence,
        prompt_style=spec.prompt.style,
        prompt_fingerprint=prompter.fingerprint,
        exemplars=len(prompter.exemplars),
        sampling=spec.sampling.model_dump(exclude={"top_logprobs"} if not spec.sampling.top_logprobs else set()),
        samples=spec.samples,
        keep_rules=[_rule_text(rule.model_dump()) for rule in spec.keep],
        hint_samples=spec.hint_retry.samples if spec.hint_retry is not None else 0,
        requests=spent["requests"],
        retries=spent["retries"],
        tokens_in=spent["tokens_in"],
        tokens_out=spent["tokens_out"],
        cost=spent["cost"],
        currency=spent["currency"] or "",
        members=_members(recipe, spec, funnel, report.get("teachers", {})),
    )


def _public_name(name: str) -> str:
    """A folder of this machine means nothing elsewhere, but for its own name."""
    return Path(name).name if Path(name).expanduser().exists() else name


def _members(
    recipe: Recipe, spec: RationaleSpec, funnel: Mapping[str, Any], spent: Mapping[str, Mapping[str, Any]]
) -> list[MemberFacts]:
    found = []
    for voice in spec.voices if spec.teacher.members() else ():
        facts = voice.describe()
        shares = [counts["teachers"][voice.name] for counts in funnel.values() if voice.name in counts["teachers"]]
        sums = {key: sum(share[key] for share in shares) for key in ("asked", "completed", "kept", "known", "right")}
        found.append(
            MemberFacts(
                voice.name,
                _public_name(facts.name),
                facts.revision,
                facts.licence if voice.votes else type(recipe.task).licence,
                voice.samples,
                make_prompter(voice.prompt, where=voice.prompt_where).fingerprint,
                **sums,
                say=shares[0]["say"],
                dropped=shares[0]["dropped"],
                cost=spent.get(voice.name, {}).get("cost"),
            )
        )
    return found


def _split_facts(file: str, counts: Mapping[str, Any]) -> SplitFacts:
    return SplitFacts(
        file=file,
        rows=counts["asked"],
        examples=counts["examples"],
        asked=counts["asked"],
        completed=counts["completed"],
        parsed=counts["parsed"],
        agreed=counts["agreed"] if counts["known"] else None,
        kept=counts["kept"],
        dropped=counts["dropped"],
        gold_examples=counts["known"],
        accuracy=counts["accuracy"],
    )


def _rule_text(rule: dict[str, Any]) -> str:
    """``min_agreement(share: 0.5)``."""
    settings = ", ".join(f"{name}: {value}" for name, value in rule.items() if name != "kind" and value != "")
    return f"{rule['kind']}({settings})" if settings else str(rule["kind"])
