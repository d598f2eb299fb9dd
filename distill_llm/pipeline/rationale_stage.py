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
from distill_llm.pipeline.asking import Asked, Asking, drop, hear_of_dropped, spent_in
from distill_llm.pipeline.pictures import check_pictures
from distill_llm.pipeline.publish import write_card
from distill_llm.pipeline.rationale_checks import check_teacher, without_exemplars
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.standing import failing_teachers, without
from distill_llm.pipeline.transfer import check_transfer
from distill_llm.pipeline.views import check_views, view_prompters
from distill_llm.rationales.dataset import Funnel, judge, make_rows, read_rows, row_writer, teacher_answers
from distill_llm.rationales.generate import Asker, Speaker
from distill_llm.rationales.members import Score, Share, say_of_each
from distill_llm.rationales.prompts import make_prompter
from distill_llm.rationales.spec import RationaleSpec
from distill_llm.recipe.recipe import Recipe
from distill_llm.schemes.stages import STUDENT

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
        voices = recipe.rationales.voices
        prompters = {v.prompt_where: make_prompter(v.prompt, where=v.prompt_where) for v in voices} | prompters
    for section, prompter in prompters.items():
        where = f"{section}.exemplars '{prompter.spec.exemplars}'"
        splits = without_exemplars(prompter.exemplars, splits, overlap=overlap, where=where)
    return splits


def check(recipe: Recipe, *, student: bool = True, teacher: bool = True) -> Splits:
    """The examples, after everything that the recipe names was found to be there.

    Called before anything is written, and before a teacher is asked for money or hours. Loads no weights. A teacher
    whose answers are all there already is not looked for: its server may be gone. Without ``student``, what only
    training needs is left out: the machine that asks need not be the one that trains. Without ``teacher``, it is not
    looked for at all.
    """
    splits = load_examples(recipe)
    _check_labels(recipe, splits)
    votes_validate = recipe.label_from != "gold"
    if recipe.train.tune and not votes_validate and all(example.label is None for example in splits.validation):
        raise ConfigError(
            "train.tune: no validation example has a label, so that nothing can choose a learning rate. Give "
            "labelled validation data (validation_data for jsonl), let the teacher's votes serve "
            "(label_from=gold_else_teacher), or remove `tune`."
        )
    if teacher and recipe.rationales is not None and not is_gathered(recipe, RunFolder(recipe.folder)):
        check_teacher(recipe.rationales, wanted_splits(recipe, splits))
    if student:
        check_training(recipe, splits)
    return splits


def check_training(recipe: Recipe, splits: Splits) -> None:
    """Finds what only training needs: the student, teachers of signals, and what they read."""
    check_pictures(recipe, splits)
    check_views(without(recipe, failing_teachers(recipe)), splits.train)
    _check_students(recipe)
    recipe.scheme.check(recipe)
    if recipe.train.report_to:
        from distill_llm.training.arguments import check_reporters

        check_reporters(recipe.train)


def _check_students(recipe: Recipe) -> None:
    """Those of all stages, but for one that starts from an earlier stage's model."""
    run = RunFolder(recipe.folder)
    stages = recipe.stages
    begun = {str(run.model(stage.name)) for stage in stages}
    reads_apart = check_student(recipe.student)
    for stage in stages:
        if stage.name == STUDENT or stage.student.model in begun:
            continue
        if check_student(stage.student, where=f"scheme: stage '{stage.name}'") != reads_apart:
            raise ConfigError(
                f"scheme: stage '{stage.name}' and the student are an encoder-decoder and a decoder-only model. All "
                "stages read the same rows: choose models of one family."
            )


def _check_labels(recipe: Recipe, splits: Splits) -> None:
    """Raises where labels that the recipe names, or chooses among, are not there."""
    from distill_llm.evaluation.likelihood import check_closed

    check_transfer(recipe, splits)
    if recipe.evaluate.by == "likelihood":
        for split in ("validation", "test"):
            check_closed(getattr(splits, split), split, tuple(recipe.evaluate.label_bias))
    fitted = [label for label, bias in recipe.evaluate.label_bias.items() if bias == "fit"]
    for label in fitted:
        if not any(
            example.label is not None and recipe.task.same(example.label, label) for example in splits.validation
        ):
            raise ConfigError(
                f"evaluate.label_bias.{label}: it is fitted on validation, where no example has this label. Give a "
                "number, or validation data with the label."
            )


def wanted_splits(recipe: Recipe, splits: Splits) -> dict[str, Sequence[Example]]:
    """What the teacher is asked about. Completions of the test split only score the teacher."""
    assert recipe.rationales is not None
    wanted: dict[str, Sequence[Example]] = {"train": splits.train}
    if recipe.rationales.knows_answers:
        return wanted
    unlabelled = [example for example in splits.validation if example.label is None]
    if recipe.rationales.weighs_by_accuracy and all(example.label is None for example in splits.train):
        wanted["validation"] = splits.validation
    elif recipe.label_from != "gold" and unlabelled:
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
    _begin_dropping(asker, recipe, run, progress)
    wanted = wanted_splits(recipe, splits)
    with Asking(asker, run, progress) as asking:
        total, found = asking.count(wanted)
        _say_what_is_there(asking, total, found, progress)
        hints, hinted = asking.count_hinted(wanted)
        if found + hinted < total + hints:
            asking.begin()
            _ask(asking, recipe, spec, wanted)
        asked = asking.asked
    main_first(lambda: _write(asker, recipe, wanted, run, progress, asked), patience=PATIENCE)


def read_material(recipe: Recipe, splits: Splits, run: RunFolder) -> Material | None:
    """What ``gather`` wrote, without asking any teacher; None where it is not there."""
    if recipe.rationales is None:
        return Material(splits, {}, {})
    if not run.rationales("train").exists() or not run.rationales_made_of.exists():
        return None
    if not is_gathered(recipe, run):
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
    """What makes the recipe's requests, with its teacher, or its teachers.

    One that cannot be opened is marked as dropped where the recipe allows that. Raises ConfigError for two that are
    one.
    """
    speakers = [
        Speaker(voice, make_prompter(voice.prompt, where=voice.prompt_where), recipe.task, recipe.seed)
        for voice in spec.voices
    ]
    known: dict[str, str] = {}
    for speaker in speakers:
        name = speaker.voice.name
        try:
            same = known.setdefault(speaker.know(), name)
        except (ConfigError, TeacherError) as error:
            if not spec.drops_failing:
                raise
            speaker.dropped = str(error)
            continue
        if same != name:
            raise ConfigError(
                f"rationales.teacher.of: {same} and {name} have the same weights and are asked the same: they would "
                "write the same. Leave one out, or give it another prompt or sampling."
            )
    return Asker(spec, speakers, recipe.task)


def _begin_dropping(asker: Asker, recipe: Recipe, run: RunFolder, progress: Progress) -> None:
    """A new command tries all teachers again; but one whose lack a student has learned with stays out."""
    if not asker.spec.drops_failing:
        return
    if run.training_has_begun and is_gathered(recipe, run):
        hear_of_dropped(asker, run)
        return
    main_first(lambda: _forget_dropped(run))
    for speaker in asker.speakers:
        if speaker.dropped:
            drop(asker, speaker, speaker.dropped, run, progress)


def _forget_dropped(run: RunFolder) -> None:
    for path in run.all_dropped():
        path.unlink()


def _ask(asking: Asking, recipe: Recipe, spec: RationaleSpec, wanted: Mapping[str, Sequence[Example]]) -> None:
    if is_gathered(recipe, RunFolder(recipe.folder)):  # then the checks were left out: the teacher has changed
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
    hear_of_dropped(asker, run)
    counts = {}
    with Asking(asker, run, progress) as everything:
        spec = recipe.rationales
        write_json(run.spent, spent_in(run, spec))
        _refuse_missing(everything, wanted, asked)
        say = _say_of_each(everything, wanted)
        for split, examples in wanted.items():
            counts[split] = _write_split(everything, split, examples, run, progress, say).report()
    for split in {"validation", "test"} - wanted.keys():
        run.rationales(split).unlink(missing_ok=True)  # of an earlier recipe
    write_json(run.funnel, counts)
    write_card(recipe, run)
    write_json(run.rationales_made_of, made_of(recipe, recipe.rationales))


def _say_of_each(asking: Asking, wanted: Mapping[str, Sequence[Example]]) -> dict[str, float] | None:
    """What each of several teachers has to say in votes; None of one alone. Never looks at the test split."""
    asker = asking.asker
    if len(asker.speakers) == 1:
        return None
    if not asker.spec.weighs_by_accuracy:
        return say_of_each(asker.spec.voices, None)
    scores = {voice.name: Score() for voice in asker.spec.voices}
    for split in ("train", "validation"):
        for example in wanted.get(split, ()):
            for one in judge(asking.requests(example, split), asking.answer, asker.task):
                if one.completion is not None:
                    scores[one.request.teacher].count(one.parsed.label, example, asker.task)
    return say_of_each(asker.spec.voices, scores)


def _write_split(
    asking: Asking,
    split: str,
    examples: Sequence[Example],
    run: RunFolder,
    progress: Progress,
    say: Mapping[str, float] | None,
) -> Funnel:
    asker, spec, task = asking.asker, asking.asker.spec, asking.asker.task
    speakers = asker.speakers_of(split) if say is not None else []
    funnel = Funnel(teachers={s.voice.name: Share(say=(say or {})[s.voice.name], dropped=s.dropped) for s in speakers})
    with_scores = spec.keeps_logprobs
    with row_writer(run.rationales(split), with_scores=with_scores) as writer:
        for done, example in enumerate(examples, start=1):
            plain = judge(asking.requests(example, split), asking.answer, task)
            hinted = judge(asking.hinted(example, split), asking.answer, task)
            rows = make_rows(plain, hinted, task, spec.keep, say)
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


def is_gathered(recipe: Recipe, run: RunFolder) -> bool:
    """Whether the folder holds the data set of this recipe."""
    path = run.rationales_made_of
    return recipe.rationales is not None and path.exists() and read_json(path) == made_of(recipe, recipe.rationales)


def made_of(recipe: Recipe, spec: RationaleSpec) -> str:
    """Changes with all that decides a rationale data set, but for the weights of a teacher in a folder."""
    prompters = [make_prompter(v.prompt, where=v.prompt_where).fingerprint for v in spec.voices]
    prompter = prompters if spec.teacher.members() else prompters[0]
    votes_validate = recipe.label_from != "gold"
    return fingerprint([recipe.task.model_dump(mode="json"), recipe.seed, spec.fingerprint, prompter, votes_validate])
