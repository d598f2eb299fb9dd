"""A recipe's examination before hours are spent: what is missing, what will be cut, what one step is like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distill_llm.core.errors import DistillError
from distill_llm.core.example import Example, Splits, TeacherAnswer
from distill_llm.data.rows import RowSet, build_rows
from distill_llm.data.view import StudentView
from distill_llm.evaluation.text_tables import short_count
from distill_llm.models.anatomy import family_of
from distill_llm.models.load import LoadedModel, build_student, count_parameters, load_tokenizer
from distill_llm.pipeline.arms import needed_targets
from distill_llm.pipeline.capture_stage import captured_teachers, plan_captures, write_capture
from distill_llm.pipeline.cuts import calibration_rows, measure_cut
from distill_llm.pipeline.diagnosis import Diagnosis, Level
from distill_llm.pipeline.first_step import examine_step
from distill_llm.pipeline.needs import needs_of_stages, summary_of
from distill_llm.pipeline.pictures import findings_of_pictures
from distill_llm.pipeline.publish import licence_warnings
from distill_llm.pipeline.rationale_checks import check_teacher
from distill_llm.pipeline.rationale_stage import Material, check, read_material, wanted_splits
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.standing import failing_teachers, warnings_of, without
from distill_llm.pipeline.student_stage import check_chat, check_positions, training_text
from distill_llm.pipeline.transfer import transferred
from distill_llm.pipeline.trial import student_view
from distill_llm.pipeline.views import TeacherViewer, check_room, facts_of_views, make_viewers, repeaters
from distill_llm.recipe.recipe import Recipe

_EXAMPLES = 2000  # whose inputs and targets are measured
_TOO_MANY_CUT = 0.05
_TOO_MANY_UNMATCHED = 0.5
_END_OF_PROMPT = 300  # characters of a teacher's view that are shown


def examine(recipe: Recipe) -> Diagnosis:
    """Checks what the recipe names, then builds the student and its teachers and takes the measure of one step.

    Trains nothing, writes nothing, asks no teacher of text. Where rationales are not there yet, the data's own or a
    stand-in takes their place, and a finding says so.
    """
    diagnosis = Diagnosis()
    try:
        recipe = recipe.resolved()
        splits = check(recipe)
        diagnosis.note("ok", "recipe", "files, models, tokenizers and teachers that it names can be had")
        recipe = _without_those_that_fail(recipe, splits, diagnosis)
        _licences(recipe, diagnosis)
        material = transferred(recipe, _material(recipe, splits, diagnosis))
        tokenizer = load_tokenizer(recipe.student, training_text(recipe, material))
        student = build_student(recipe.student.in_size(), tokenizer)
        student = recipe.scheme.assemble(student, recipe.student, recipe.training_seed)
        check_chat(recipe, tokenizer)
        _stages(recipe, tokenizer, diagnosis)
        view = student_view(recipe, tokenizer, student.is_encoder_decoder, student.painter)
        check_positions(recipe, student.model.config, view)
        viewers = make_viewers(recipe, student, view)
        rows = _rows(recipe, material, view, viewers)
        check_room(recipe, rows.rows, student)
        student = _cut(recipe, student, rows, diagnosis)
        _views(recipe, rows, viewers, diagnosis)
        if student.painter is not None:
            for level, said in findings_of_pictures(student.painter, rows.rows):
                diagnosis.note(level, "pictures", said)
        _cuts(recipe, rows, diagnosis)
        with TemporaryDirectory() as folder:
            recipe = _with_stages(recipe, diagnosis)
            recipe = _with_captures(recipe, material, rows, tokenizer, Path(folder), diagnosis)
            examine_step(recipe, student, rows, diagnosis)
    except DistillError as error:
        diagnosis.note("error", "recipe", str(error))
    return diagnosis


def _without_those_that_fail(recipe: Recipe, splits: Splits, diagnosis: Diagnosis) -> Recipe:
    """Says which of several teachers of text, and of an ensemble's, would be dropped."""
    spec, run = recipe.rationales, RunFolder(recipe.folder)
    if spec is not None and spec.drops_failing and not run.rationales_made_of.exists():
        for name, reason in check_teacher(spec, wanted_splits(recipe, splits)).items():
            diagnosis.note("warning", f"teacher {name}", f"it would be dropped: {reason}")
    lacking = failing_teachers(recipe)
    for sentence in warnings_of(lacking):
        diagnosis.note("warning", "ensemble", sentence)
    return without(recipe, lacking)


def _stages(recipe: Recipe, tokenizer: Any, diagnosis: Diagnosis) -> None:
    """The trainings that the scheme makes of the recipe, where these are several."""
    if len(recipe.stages) < 2:
        return
    needs = needs_of_stages(recipe, tokenizer)
    for one in needs:
        diagnosis.note("ok", f"stage {one.name}", str(one))
    said, fits = summary_of(needs, recipe.folder)
    diagnosis.note("ok" if fits else "warning", "all stages", said)


def _cut(recipe: Recipe, student: LoadedModel, rows: RowSet, diagnosis: Diagnosis) -> LoadedModel:
    """Says what becomes of the student's model; gives the student as its cut will be measured, if it has to be."""
    spec = recipe.student
    if spec.cut is None:
        return student
    whole = count_parameters(spec.model, spec.revision, where="student.model")
    kept = None
    if spec.measures:
        kept, _ = measure_cut(spec, student.tokenizer, calibration_rows(recipe, rows.rows, spec.cut.calibration_rows))
        student = build_student(spec, student.tokenizer, kept=kept)
        student = recipe.scheme.assemble(student, spec, recipe.training_seed)
    left = student.num_parameters
    sizes = family_of(student.model.config, "student.cut").sizes_of(student.model.config)
    layers = "" if kept is None else f"; layers {', '.join(f'{s} {list(one)}' for s, one in kept.layers.items())}"
    said = f"{short_count(left)} of {short_count(whole)} parameters ({left / whole:.0%}) stay: {sizes}{layers}"
    diagnosis.note("ok", "cut", said)
    return student


def _with_stages(recipe: Recipe, diagnosis: Diagnosis) -> Recipe:
    """With the stages that terms name as teachers; the terms of one that is not trained yet are left out."""
    run, teachers, objective = RunFolder(recipe.folder), dict(recipe.teachers), recipe.objective
    for name in sorted(recipe.scheme.offers & {term.teacher for term in objective if term.teacher is not None}):
        if run.result(name).exists():
            teachers[name] = recipe.stages[-1].teachers[name]
            continue
        diagnosis.note("warning", f"teacher {name}", "a stage, not trained yet: its terms are not looked at below")
        objective = tuple(term for term in objective if term.teacher != name)
    return recipe.model_copy(update={"teachers": teachers, "objective": objective})


def _licences(recipe: Recipe, diagnosis: Diagnosis) -> None:
    for warning in licence_warnings(recipe):
        diagnosis.note("warning", "licence", warning)
    if not recipe.student.config:
        from distill_llm.models.card import licence_of

        licence = licence_of(recipe.student.model, recipe.student.revision)
        level: Level = "ok" if licence else "warning"
        diagnosis.note(level, "licence", f"student {recipe.student.model}: {licence or 'its card names none'}")


def _material(recipe: Recipe, splits: Splits, diagnosis: Diagnosis) -> Material:
    material = read_material(recipe, splits, RunFolder(recipe.folder))
    if material is not None:
        if recipe.rationales is not None:
            kept = sum(bool(answer.rationales) for answer in material.answers.values())
            diagnosis.note("ok", "rationales", f"{kept:,} of {len(splits.train):,} examples have one")
        return material
    answers = {example.id: _stand_in(example) for example in splits.train[:_EXAMPLES]}
    gold = sum(example.rationale is not None for example in splits.train[:_EXAMPLES])
    diagnosis.note(
        "warning",
        "rationales",
        f"not generated yet: lengths below are those of {gold:,} rationales of the data and of "
        f"{len(answers) - gold:,} stand-ins (the input itself)",
    )
    return Material(splits, answers, {})


def _stand_in(example: Example) -> TeacherAnswer:
    label = example.label if example.label is not None else next(iter(example.choices), "?")
    return TeacherAnswer(label, (example.rationale or example.input,), 1.0)


def _rows(recipe: Recipe, material: Material, view: StudentView, viewers: Mapping[str, TeacherViewer]) -> RowSet:
    return build_rows(
        material.splits.train[:_EXAMPLES],
        material.answers,
        task=recipe.task,
        view=view,
        targets=needed_targets(recipe),
        label_from=recipe.label_from,
        viewers=viewers,
    )


def _views(recipe: Recipe, rows: RowSet, viewers: Mapping[str, TeacherViewer], diagnosis: Diagnosis) -> None:
    for name, facts in facts_of_views(recipe, rows.rows).items():
        level: Level = "warning" if facts.unmatched > _TOO_MANY_UNMATCHED * facts.num_tokens else "ok"
        diagnosis.note(level, f"view of {name}", str(facts))
        first = next(row.views[name] for row in rows.rows if name in row.views)
        if first.picture is not None:
            text = f"a picture of: {first.picture.text or 'its image'}"
        else:
            text = viewers[name].reader.tokenizer.decode(list(first.input_ids))
        end = text if len(text) <= _END_OF_PROMPT else f"... {text[-_END_OF_PROMPT:]}"
        diagnosis.note("ok", f"view of {name}", f"of one row: {end}")
    for name, target in repeaters(recipe):
        diagnosis.note(
            "warning",
            f"view of {name}",
            f"it is told the {target} and asked for it: on the target {target} it can only repeat it, which "
            "cross_entropy does for nothing",
        )


def _cuts(recipe: Recipe, rows: RowSet, diagnosis: Diagnosis) -> None:
    total = len(rows.rows)
    for what, cut, limit in (
        ("inputs", rows.inputs_cut, _input_limit(recipe)),
        ("targets", rows.targets_cut, f"train.max_target_tokens={recipe.train.max_target_tokens}"),
    ):
        level: Level = "warning" if cut > _TOO_MANY_CUT * total else "ok"
        diagnosis.note(level, what, f"{cut:,} of {total:,} are cut ({cut / total:.1%}) by {limit}")
    for target, number in rows.count().items():
        lengths = sorted(len(row.label_ids) for row in rows.rows if row.target == target)
        said = f"{number:,} rows; tokens: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}"
        diagnosis.note("ok", f"target {target}", said)


def _input_limit(recipe: Recipe) -> str:
    picture = recipe.student.picture
    if picture is not None:
        return f"student.picture ({picture.width} x {picture.height}, font {picture.font})"
    return f"train.max_input_tokens={recipe.train.max_input_tokens}"


def _with_captures(
    recipe: Recipe, material: Material, rows: RowSet, tokenizer: Any, folder: Path, diagnosis: Diagnosis
) -> Recipe:
    """Says what was captured of the rows; ``folder`` holds it. Without rationales its terms are left out here."""
    names, run = captured_teachers(recipe), RunFolder(recipe.folder)
    if names and not (run.rationales("train").exists() and run.rationales_made_of.exists()):
        kept = tuple(term for term in recipe.objective if term.teacher not in names)
        for name in names:
            diagnosis.note("warning", f"captured {name}", "not generated yet: its terms are not looked at below")
        return recipe.model_copy(update={"objective": kept})
    teachers = dict(recipe.teachers)
    for plan in plan_captures(recipe, rows.rows, material.splits.train[:_EXAMPLES], run, tokenizer):
        here = replace(plan, folder=folder / plan.name)
        report = write_capture(here, run.rationales("train"), tokenizer)
        level: Level = "ok" if (report.known or 0) >= 1 - _TOO_MANY_UNMATCHED else "warning"
        said = f"at {report.known:.1%} of {report.tokens:,} tokens of {report.rows:,} rows; the words that were kept"
        diagnosis.note(level, f"captured {plan.name}", f"{said} hold {report.captured_mass:.2%} there")
        teachers[plan.name] = teachers[plan.name].placed(here.folder)
    return recipe.model_copy(update={"teachers": teachers})
