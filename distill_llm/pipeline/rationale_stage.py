"""Stage one: the task's examples, and what the teacher says of them."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from distill_llm.core.errors import BudgetReached, ConfigError, TeacherError
from distill_llm.core.example import Example, Splits, TeacherAnswer
from distill_llm.core.files import fingerprint, read_json, write_json
from distill_llm.core.processes import main_first, world_size
from distill_llm.core.progress import Progress
from distill_llm.models.load import check_student
from distill_llm.pipeline.asking import Asked, Asking
from distill_llm.pipeline.pictures import check_pictures
from distill_llm.pipeline.publish import write_card
from distill_llm.pipeline.rationale_checks import check_teacher, without_exemplars
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.views import check_views, view_prompters
from distill_llm.rationales.dataset import Funnel, judge, make_rows, read_rows, row_writer, teacher_answers
from distill_llm.rationales.generate import Asker
from distill_llm.rationales.ledger import ledger_report, read_ledgers
from distill_llm.rationales.prompts import make_prompter
from distill_llm.rationales.spec import RationaleSpec
from distill_llm.recipe.recipe import Recipe

PATIENCE = datetime.timedelta(days=7)  # one process may have asked for all of its share long before another
_MANY = 20_000  # examples, from which on parsing them is worth a bar


@dataclass(frozen=True, slots=True)
class Material:
    """What training and scoring need: examples, the teacher's answers to train, and to test where it was asked."""

    splits: Splits
    answers: Mapping[str, TeacherAnswer]
    test_answers: Mapping[str, TeacherAnswer]


def load_examples(recipe: Recipe) -> Splits:
    """The task's examples, without those that some teacher sees worked out in its prompt."""
    splits, overlap = recipe.task.load(recipe.seed), recipe.task.overlap
    prompters = {f"teachers.{name}.view": prompter for name, prompter in view_prompters(recipe).items()}
    if recipe.rationales is not None:
        prompters = {"rationales.prompt": make_prompter(recipe.rationales.prompt), **prompters}
    for section, prompter in prompters.items():
        where = f"{section}.exemplars '{prompter.spec.exemplars}'"
        splits = without_exemplars(prompter.exemplars, splits, overlap=overlap, where=where)
    return splits


def check(recipe: Recipe, *, student: bool = True) -> Splits:
    """The examples, after everything that the recipe names was found to be there.

    Called before anything is written, and before a teacher is asked for money or hours. Loads no weights. A teacher
    whose answers are all there already is not looked for: its server may be gone. Without ``student``, what only
    training needs is left out: the machine that asks need not be the one that trains.
    """
    splits = load_examples(recipe)
    votes_validate = recipe.label_from != "gold"
    if recipe.train.tune and not votes_validate and all(example.label is None for example in splits.validation):
        raise ConfigError(
            "train.tune: no validation example has a label, so that nothing can choose a learning rate. Give "
            "labelled validation data (validation_data for jsonl), let the teacher's votes serve "
            "(label_from=gold_else_teacher), or remove `tune`."
        )
    if recipe.rationales is not None and not _is_gathered(recipe, RunFolder(recipe.folder)):
        check_teacher(recipe.rationales, wanted_splits(recipe, splits))
    if not student:
        return splits
    for teacher in recipe.teachers.values():
        teacher.check()
    check_pictures(recipe, splits)
    check_views(recipe, splits.train)
    check_student(recipe.student)
    if recipe.train.report_to:
        from distill_llm.training.arguments import check_reporters

        check_reporters(recipe.train)
    return splits


def wanted_splits(recipe: Recipe, splits: Splits) -> dict[str, Sequence[Example]]:
    """What the teacher is asked about. Completions of the test split only score the teacher."""
    assert recipe.rationales is not None
    wanted: dict[str, Sequence[Example]] = {"train": splits.train}
    if recipe.rationales.teacher.knows_answers:
        return wanted
    unlabelled = [example for example in splits.validation if example.label is None]
    if recipe.label_from != "gold" and unlabelled:
        wanted["validation"] = unlabelled
    if recipe.evaluate.teacher:
        wanted["test"] = splits.test
    return wanted


def gather(recipe: Recipe, splits: Splits, run: RunFolder, progress: Progress) -> None:
    """Completes what the teacher has not answered yet, and writes the rationale data set.

    Under torchrun each process asks its share. Raises BudgetReached, or TeacherError where requests failed, unless
    the recipe allows so many to be missing.
    """
    sizes = f"{len(splits.train):,} train, {len(splits.validation):,} validation, {len(splits.test):,} test"
    dropped = f"; {splits.dropped:,} left out, their input is in another split" if splits.dropped else ""
    progress.say(f"examples: {sizes}{dropped}")
    spec = recipe.rationales
    if spec is None:
        return
    asker = make_asker(recipe, spec)
    wanted = wanted_splits(recipe, splits)
    with Asking(asker, run, progress) as asking:
        total, found = asking.count(wanted)
        _say_what_is_there(asking, total, found, progress)
        hints, hinted = asking.count_hinted(wanted)
        if found + hinted < total + hints:
            _ask(asking, recipe, spec, wanted)
        asked = asking.asked
    main_first(lambda: _write(asker, recipe, wanted, run, progress, asked), patience=PATIENCE)


def read_material(recipe: Recipe, splits: Splits, run: RunFolder) -> Material | None:
    """What ``gather`` wrote, without asking any teacher; None where it is not there."""
    if recipe.rationales is None:
        return Material(splits, {}, {})
    if not run.rationales("train").exists() or not run.rationales_made_of.exists():
        return None
    if not _is_gathered(recipe, run):
        raise ConfigError(
            f"{run.rationales('train')}: these rationales were made with another task, seed or `rationales` section. "
            "First type: distill-llm generate-rationales RECIPE (what the journal holds is not asked again)."
        )
    answers = {
        split: teacher_answers(read_rows(path))
        for split in ("train", "validation", "test")
        if (path := run.rationales(split)).exists()
    }
    if "validation" in answers:
        splits = replace(splits, validation=_labelled(splits.validation, answers["validation"]))
    return Material(splits, answers["train"], answers.get("test", {}))


def make_asker(recipe: Recipe, spec: RationaleSpec) -> Asker:
    """What makes the recipe's requests, with its teacher."""
    teacher = spec.teacher.open(task=recipe.task, sampling=spec.sampling, seed=recipe.seed)
    return Asker(spec, make_prompter(spec.prompt), teacher, recipe.task, recipe.seed)


def _ask(asking: Asking, recipe: Recipe, spec: RationaleSpec, wanted: Mapping[str, Sequence[Example]]) -> None:
    if _is_gathered(recipe, RunFolder(recipe.folder)):  # then the checks were left out: the teacher has changed
        check_teacher(spec, wanted)
    for split, examples in wanted.items():
        asking.complete(split, examples)


def _say_what_is_there(asking: Asking, total: int, found: int, progress: Progress) -> None:
    unused = len(asking.journal) - found - asking.hinted_in_journal
    if found:
        progress.say(f"journal: {found:,} of {total:,} completions are there already")
    if unused > 0:
        progress.say(f"journal: {unused:,} completions were made with other settings; they stay there, unused")


def _write(
    asker: Asker,
    recipe: Recipe,
    wanted: Mapping[str, Sequence[Example]],
    run: RunFolder,
    progress: Progress,
    asked: Asked,
) -> None:
    """The data set, from the journals of all processes."""
    assert recipe.rationales is not None
    run.rationales_made_of.unlink(missing_ok=True)
    counts = {}
    with Asking(asker, run, progress) as everything:
        write_json(run.spent, ledger_report(read_ledgers(run.ledgers()), recipe.rationales.prices))
        _refuse_missing(everything, wanted, asked)
        for split, examples in wanted.items():
            counts[split] = _write_split(everything, split, examples, run, progress).report()
    for split in {"validation", "test"} - wanted.keys():
        run.rationales(split).unlink(missing_ok=True)  # of an earlier recipe
    write_json(run.funnel, counts)
    write_card(recipe, run)
    write_json(run.rationales_made_of, _made_of(recipe, recipe.rationales))


def _write_split(asking: Asking, split: str, examples: Sequence[Example], run: RunFolder, progress: Progress) -> Funnel:
    asker, spec, task = asking.asker, asking.asker.spec, asking.asker.task
    funnel = Funnel()
    with_scores = spec.sampling.top_logprobs > 0
    with row_writer(run.rationales(split), with_scores=with_scores) as writer:
        for done, example in enumerate(examples, start=1):
            plain = judge(asker.requests(example, split), asking.answer, task)
            hinted = judge(asking.hinted(example, split), asking.answer, task)
            rows = make_rows(plain, hinted, task, spec.keep)
            writer.write(rows, [judged.completion and judged.completion.scores for judged in (*plain, *hinted)])
            funnel.count(rows, task)
            if len(examples) >= _MANY and (done % 1000 == 0 or done == len(examples)):
                progress.advance(f"parse, vote, keep: {split}", done, len(examples))
    return funnel


def _refuse_missing(asking: Asking, wanted: Mapping[str, Sequence[Example]], asked: Asked) -> None:
    """Raises where more requests came to nothing than the recipe allows."""
    (plain, answered), (hints, hinted) = asking.count(wanted), asking.count_hinted(wanted)
    total, found = plain + hints, answered + hinted
    missing = total - found
    if missing / total <= asking.asker.spec.allow_missing:
        return
    go_on = f"To go on without them: rationales.allow_missing={math.ceil(100 * missing / total) / 100:.2f}."
    if asked.closed:
        raise BudgetReached(
            f"rationales.{asked.closed}: the budget is used up with {found:,} of {total:,} completions there. Raise it "
            f"and type the same command: what is there is not asked again. {go_on}"
        )
    elsewhere = " (in other processes)" if world_size() > 1 else ""
    reason = next(iter(asked.failures.values()), f"no reason is known{elsewhere}")
    raise TeacherError(
        f"rationales: {missing:,} of {total:,} requests came to nothing, such as: {reason} Type the same command to "
        f"ask again for those alone. {go_on}"
    )


def _labelled(examples: Sequence[Example], answers: Mapping[str, TeacherAnswer]) -> tuple[Example, ...]:
    """Examples without a label take the teacher's vote."""
    return tuple(
        replace(example, label=answers[example.id].label)
        if example.label is None and example.id in answers
        else example
        for example in examples
    )


def _is_gathered(recipe: Recipe, run: RunFolder) -> bool:
    """Whether the folder holds the data set of this recipe."""
    made_of = run.rationales_made_of
    return (
        recipe.rationales is not None and made_of.exists() and read_json(made_of) == _made_of(recipe, recipe.rationales)
    )


def _made_of(recipe: Recipe, spec: RationaleSpec) -> str:
    """Changes with all that decides a rationale data set, but for the weights of a teacher in a folder."""
    prompter = make_prompter(spec.prompt).fingerprint
    votes_validate = recipe.label_from != "gold"
    return fingerprint([recipe.task.model_dump(mode="json"), recipe.seed, spec.fingerprint, prompter, votes_validate])
