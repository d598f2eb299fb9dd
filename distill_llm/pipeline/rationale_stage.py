"""Stage one: the task's examples, and what the teacher says of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill_llm.core.errors import ConfigError
from distill_llm.core.example import Example, Splits, TeacherAnswer
from distill_llm.core.files import Journal, fingerprint, read_json, write_json
from distill_llm.core.progress import Progress
from distill_llm.models.load import check_student
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.rationales.dataset import RationaleRow, funnel, make_rows, read_rows, save_rows, teacher_answers
from distill_llm.rationales.generate import complete, make_requests
from distill_llm.rationales.prompts import make_prompter
from distill_llm.rationales.spec import RationaleSpec
from distill_llm.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Material:
    """What training and scoring need: examples, the teacher's answers to train, and to test where it was asked."""

    splits: Splits
    answers: Mapping[str, TeacherAnswer]
    test_answers: Mapping[str, TeacherAnswer]


def check(recipe: Recipe) -> Splits:
    """The examples, after everything that the recipe names was found to be there.

    Called before anything is written, and before a teacher is asked for money or hours. Loads no weights.
    """
    splits = recipe.task.load(recipe.seed)
    if recipe.train.tune and all(example.label is None for example in splits.validation):
        raise ConfigError(
            "train.tune: no validation example has a label, so that nothing can choose a learning rate. Give "
            "labelled validation data (validation_data for jsonl), or remove `tune`."
        )
    if recipe.rationales is not None:
        make_prompter(recipe.rationales.prompt)
        recipe.rationales.teacher.check()
    for teacher in recipe.teachers.values():
        teacher.check()
    check_student(recipe.student)
    if recipe.train.report_to:
        from distill_llm.training.arguments import check_reporters

        check_reporters(recipe.train)
    return splits


def gather(recipe: Recipe, splits: Splits, run: RunFolder, progress: Progress) -> Material:
    """Completes what the teacher has not answered yet. Completions of the test split only score the teacher."""
    sizes = f"{len(splits.train):,} train, {len(splits.validation):,} validation, {len(splits.test):,} test"
    dropped = f"; {splits.dropped:,} left out, their input is in another split" if splits.dropped else ""
    progress.say(f"examples: {sizes}{dropped}")
    if recipe.rationales is None:
        return Material(splits, {}, {})
    wanted = {"train": splits.train}
    if recipe.evaluate.teacher and not recipe.rationales.teacher.knows_answers:
        wanted["test"] = splits.test
    rows = _answered(recipe, recipe.rationales, wanted, run, progress)
    found = {split: teacher_answers(part) for split, part in rows.items()}
    return Material(splits, found["train"], found.get("test", {}))


def read_material(recipe: Recipe, splits: Splits, run: RunFolder) -> Material | None:
    """What ``gather`` wrote, without asking any teacher; None where it is not there."""
    if recipe.rationales is None:
        return Material(splits, {}, {})
    if not run.rationales("train").exists() or not run.rationales_made_of.exists():
        return None
    if read_json(run.rationales_made_of) != _made_of(recipe, recipe.rationales):
        raise ConfigError(
            f"{run.rationales('train')}: these rationales were made with another task, seed or `rationales` section. "
            "First type: distill-llm generate-rationales RECIPE (what the journal holds is not asked again)."
        )
    test = run.rationales("test")
    return Material(
        splits,
        teacher_answers(read_rows(run.rationales("train"))),
        teacher_answers(read_rows(test)) if test.exists() else {},
    )


def _answered(
    recipe: Recipe,
    spec: RationaleSpec,
    wanted: Mapping[str, Sequence[Example]],
    run: RunFolder,
    progress: Progress,
) -> dict[str, list[RationaleRow]]:
    prompter = make_prompter(spec.prompt)
    journal = Journal(run.journal)
    teacher = spec.teacher.open(task=recipe.task, sampling=spec.sampling, seed=recipe.seed)
    found, counts = {}, {}
    for split, examples in wanted.items():
        requests = make_requests(examples, split, spec, prompter, teacher.identity, recipe.seed)
        waiting = sum(request.key not in journal.entries for request in requests)
        start = time.monotonic()
        completions = complete(requests, teacher, journal, progress, f"rationales, {split}")
        if waiting:
            run.note_seconds(split, waiting, time.monotonic() - start)
        found[split] = make_rows(requests, completions, recipe.task, spec.keep)
        save_rows(run.rationales(split), found[split])
        counts[split] = funnel(found[split], recipe.task)
    write_json(run.funnel, counts)
    write_json(run.rationales_made_of, _made_of(recipe, spec))
    return found


def _made_of(recipe: Recipe, spec: RationaleSpec) -> str:
    """Changes with all that decides a rationale data set, but for the weights of a teacher in a folder."""
    head = make_prompter(spec.prompt).head
    return fingerprint([recipe.task.model_dump(mode="json"), recipe.seed, spec.model_dump(mode="json"), head])
