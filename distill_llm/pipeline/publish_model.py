"""A run's model on its way to the Hub: what is sent, its card, and the merged weights of an adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import ConfigError
from distill_llm.core.files import read_json, storage, write_text
from distill_llm.core.quiet import quiet_libraries
from distill_llm.core.schedule import Schedule
from distill_llm.evaluation.export_report import export_markdown, export_notes
from distill_llm.evaluation.scorecard import FILE_NAME, comparisons_markdown, load_scorecard, models_markdown
from distill_llm.hub.markdown import code, percent, table
from distill_llm.hub.model_card import ModelCardFacts, ScoreFacts, TeacherFacts, TermFacts, licence_warnings, model_card
from distill_llm.models.folder import is_adapter
from distill_llm.models.load import count_parameters, load_model, read_config, read_tokenizer, revision_of
from distill_llm.models.lora import base_of, has_bits
from distill_llm.models.quantize import is_quantized
from distill_llm.pipeline.export_stage import finished_exports
from distill_llm.pipeline.publish import public_task
from distill_llm.pipeline.rationale_stage import load_examples
from distill_llm.pipeline.run_folder import RunFolder, open_run
from distill_llm.pipeline.trial import max_new_tokens, student_view
from distill_llm.recipe.recipe import Recipe
from distill_llm.schemes.stages import FROM_SCRATCH, STUDENT

if TYPE_CHECKING:
    from distill_llm.evaluation.scorecard import Entry, Scorecard
    from distill_llm.hub.upload import Pushed, Upload

_LOADED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""Files of a model's folder that ``from_pretrained`` may read; training leaves more there."""


@dataclass(frozen=True, slots=True)
class ModelPush:
    """All that a push sends: path in the repository to local file. ``warnings``: of licences, a sentence each."""

    repo_id: str
    files: dict[str, Path]
    warnings: list[str]
    uploads: tuple[Upload, ...]


def plan_model_push(
    run_dir: str | Path,
    repo_id: str,
    *,
    arm: str = STUDENT,
    licence: str = "",
    merge: bool = False,
    rationales: bool = False,
    exports: bool = False,
) -> ModelPush:
    """Writes the card, and merged weights where they are wanted or needed, into the run's folder; sends nothing.

    An adapter is sent as it is where its base is a model of the Hub in full precision, else merged into it.
    Raises ConfigError where the arm is not trained.
    """
    from distill_llm.hub.upload import plan_uploads

    quiet_libraries()
    run, recipe = open_run(run_dir)
    if arm not in run.trained_arms():
        raise ConfigError(f"{run.root}: no arm '{arm}' is trained here; there are {run.trained_arms()}.")
    folder = _folder_to_send(run, arm, merge=merge)
    sent = {path.name: path for pattern in _LOADED for path in sorted(folder.glob(pattern))}
    sent |= {f"distill/{path.name}": path for path in (run.recipe, run.root / FILE_NAME, run.funnel) if path.exists()}
    if rationales:
        if not run.rationales_made_of.exists():
            raise ConfigError(f"{run.root}: there is no finished rationale data set to be sent with the model.")
        sent |= {f"rationales/{path.name}": path for path in sorted(run.rationale_folder.glob("*.parquet"))}
    facts = _facts(recipe, run, arm, folder, repo_id=repo_id, licence=licence, files=sorted(sent))
    if exports:
        files, table_and_notes = _exported(run, arm)
        sent |= files
        facts = replace(facts, exports=table_and_notes)
    card = run.root / "hub" / arm / "README.md"
    write_text(card, model_card(facts))
    files = {"README.md": card, **sent}
    return ModelPush(repo_id, files, licence_warnings(facts), plan_uploads(files))


def push_model(plan: ModelPush, *, private: bool = True) -> Pushed:
    """Sends what ``plan_model_push`` planned, in one commit; what is there already is not sent again."""
    from distill_llm.hub.upload import push

    name = plan.repo_id.split("/")[-1]
    return push(plan.files, repo_id=plan.repo_id, repo_type="model", private=private, message=f"Distilled {name}")


def _exported(run: RunFolder, arm: str) -> tuple[dict[str, Path], str]:
    """Files of the arm's exports by their path in the repository, and what the card says of them."""
    found = finished_exports(run, arm)
    if not found:
        named = "" if arm == STUDENT else f" --arm {arm}"
        raise ConfigError(
            f"{run.root}: nothing of '{arm}' is exported yet. Type: distill-llm export {run.root} --format all{named}"
        )
    files = {f"exports/{folder.name}/{path.name}": path for folder, _ in found for path in sorted(folder.iterdir())}
    reports = [report for _, report in found]
    notes = "\n".join(f"- {note}" for note in export_notes(reports))
    return files, f"{export_markdown(reports)}\n\n{notes}"


def _folder_to_send(run: RunFolder, arm: str, *, merge: bool) -> Path:
    folder = run.model(arm)
    if not is_adapter(str(folder)):
        return folder
    base, _ = base_of(str(folder))
    if not merge and not Path(base).expanduser().is_dir() and not has_bits(folder):
        return folder
    # By its weights, or an arm that was trained anew would be sent as it was.
    merged = run.root / "hub" / arm / f"merged-{revision_of(str(folder), where=f'arm {arm}')}"
    if not merged.exists():
        draft = Path(f"{merged}.part")
        shutil.rmtree(draft, ignore_errors=True)
        with storage(merged):
            load_model(str(folder), where=f"arm {arm}").save_pretrained(str(draft))
            read_tokenizer(str(folder), where=f"arm {arm}").save_pretrained(str(draft))
            draft.rename(merged)
    return merged


def _facts(
    recipe: Recipe, run: RunFolder, arm: str, folder: Path, *, repo_id: str, licence: str, files: Sequence[str]
) -> ModelCardFacts:
    from distill_llm import __version__

    trained = read_json(run.result(arm))
    config = read_config(str(folder), where=f"arm {arm}")
    card = load_scorecard(run.root) if (run.root / FILE_NAME).exists() else None
    entry = next((one for one in card.entries if one.name == arm.replace("_", " ")), None) if card else None
    task, data = public_task(recipe)
    return ModelCardFacts(
        repo_id=repo_id,
        task=task,
        task_data=data,
        task_licence=type(recipe.task).licence,
        licence=licence,
        base_model=_base_model(recipe, folder, arm),
        begun=_begun(recipe, arm),
        adapter=is_adapter(str(folder)),
        quantized=is_quantized(config),
        is_encoder_decoder=bool(config.is_encoder_decoder),
        parameters=count_parameters(str(folder), where=f"arm {arm}"),
        teachers=list(_teachers(recipe)),
        funnel=_funnel(run),
        terms=[_term(term) for term in trained["terms"]],
        training=_training(recipe, trained),
        score=_score(card, entry) if card and entry else None,
        speed=_speed(card, entry) if card and entry else "",
        max_new_tokens=max_new_tokens(recipe),
        files=files,
        version=__version__,
        **_example(recipe, run, arm, config, trained["target"]),
    )


def _base_model(recipe: Recipe, folder: Path, arm: str) -> str:
    source = base_of(str(folder))[0] if is_adapter(str(folder)) else recipe.student.model
    return "" if not _begun(recipe, arm) or Path(source).expanduser().is_dir() else source


def _begun(recipe: Recipe, arm: str) -> str:
    """Whose weights it began with; "" for random ones."""
    student = recipe.student
    if not student.model or student.fresh or arm == FROM_SCRATCH:
        return ""
    return f"{'a part of ' if student.cut is not None else ''}{code(_shown(student.model))}"


def _teachers(recipe: Recipe) -> Iterator[TeacherFacts]:
    from distill_llm.models.card import licence_of

    for voice in recipe.rationales.voices if recipe.rationales is not None else ():
        if voice.votes and not voice.teacher.knows_answers:
            known = voice.describe()
            yield TeacherFacts(_shown(known.name), known.revision, known.licence, "rationales and labels")
    for name, teacher in recipe.teachers.items():
        source = getattr(teacher, "model", "")
        if source:
            revision = "" if Path(source).expanduser().is_dir() else getattr(teacher, "revision", "")
            yield TeacherFacts(_shown(source), revision, licence_of(source), f"soft labels (`{name}`)")


def _shown(name: str) -> str:
    """A Hub id whole, of a folder nothing but what tells it apart: the card goes to other machines."""
    folder = Path(name).expanduser()
    if not folder.exists():
        return name
    parts = [part for part in folder.parts if part not in ("/", "model", "models", "student", "runs", "..", ".")]
    return "/".join(parts[-2:])


def _funnel(run: RunFolder) -> str:
    if not run.funnel.exists():
        return ""
    rows = []
    for split, counts in read_json(run.funnel).items():
        right = "no labels" if counts["accuracy"] is None else f"{counts['accuracy']:.1%}"
        kept = f"{counts['kept']:,} ({percent(counts['kept'], counts['asked'])})"
        rows.append((split, f"{counts['asked']:,}", f"{counts['parsed']:,}", kept, right))
    return table(
        ("split", "completions", "label could be read", "kept", "teacher's label is right"), rows, numbers=True
    )


def _term(term: dict[str, Any]) -> TermFacts:
    weight, loss = term["weight"], dict(term["loss"])
    shown = f"{weight['start']:g} \\to {weight['end']:g}" if isinstance(weight, dict) else f"{weight:g}"
    settings = ", ".join(f"{key} {_setting(value)}" for key, value in loss.items() if key != "kind")
    until = f", until {term['until']:.0%} of the steps" if term["until"] < 1 else ""
    return TermFacts(
        term["name"],
        shown,
        loss["kind"] + (f" ({settings})" if settings else "") + until,
        term["targets"],
        term["teacher"] or "",
    )


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        schedule = Schedule.model_validate(value)
        return f"{schedule.start:g} to {schedule.end:g}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _training(recipe: Recipe, trained: dict[str, Any]) -> list[str]:
    if not trained["steps"]:
        return [f"none of its own: {trained['description']}"]
    spec, computed = recipe.train, trained.get("precision", "float32")
    chosen = "the last" if trained["validation_accuracy"] is None else "the best on validation"
    return [
        f"{trained['steps']:,} steps of {spec.rows_per_step} rows with {spec.optimizer} at "
        f"{trained['learning_rate']:g}; {trained['tokens']:,} tokens in {trained['seconds']:,.0f} s, in {computed}",
        f"the checkpoint of step {trained['best_step']:,}, {chosen}",
        f"seed {recipe.seed}; labels: {recipe.label_from}",
    ]


def _score(card: Scorecard, entry: Entry) -> ScoreFacts:
    return ScoreFacts(
        metric=card.metric,
        split=card.split,
        accuracy=entry.accuracy,
        num_examples=entry.num_examples,
        verdict=card.verdict,
        models=models_markdown(card),
        comparisons=comparisons_markdown(card),
        notes=[*card.notes, f"Measured on {card.hardware}, {card.created.isoformat()}."],
    )


def _speed(card: Scorecard, entry: Entry) -> str:
    teacher = next((one for one in card.entries if one.role == "teacher"), None)
    if teacher is None:
        return ""
    parts = []
    if teacher.parameters and entry.parameters:
        parts.append(f"{teacher.parameters / entry.parameters:.3g} times fewer parameters")
    if teacher.bytes and entry.bytes:
        parts.append(f"{teacher.bytes / entry.bytes:.3g} times smaller on disk")
    if teacher.examples_per_second and entry.examples_per_second:
        ratio = entry.examples_per_second / teacher.examples_per_second
        parts.append(f"{ratio:.3g} times as many examples a second")
    return f"Against the teacher: {', '.join(parts)}." if parts else ""


def _example(recipe: Recipe, run: RunFolder, arm: str, config: Any, target: Any) -> dict[str, Any]:
    """The first test example as the model reads it, and what it wrote for it when it was scored.

    None for a model that reads pictures: a snippet would need the renderer.
    """
    tokenizer = read_tokenizer(str(run.model(arm)), where=f"arm {arm}")
    view = student_view(recipe, tokenizer, bool(config.is_encoder_decoder))
    test = load_examples(recipe).test
    if not test or not run.predictions(arm).exists() or recipe.student.picture is not None:
        return {"example": "", "answer": "", "decoder_start": (), "chat": view.chat}
    first = json.loads(run.predictions(arm).read_text(encoding="utf-8").splitlines()[0])
    prefix = view.prefixes.of(target) if view.prefix_side == "encoder" else ""
    text = prefix + test[0].input
    start = view.decoder_prefix(target)
    return {
        "example": text if view.is_encoder_decoder or view.chat else f"{text}\n",
        "answer": first["text"],
        "decoder_start": (config.decoder_start_token_id, *start) if start else (),
        "chat": view.chat,
    }
