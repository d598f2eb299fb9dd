"""A recipe's examination before hours are spent: what is missing, what will be cut, what one step is like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from distill_llm.core.errors import DistillError
from distill_llm.core.example import Example, Splits, TeacherAnswer
from distill_llm.core.signals import IGNORE_INDEX, Batch, Signals, select_rows
from distill_llm.data.rows import Row, RowSet, build_rows
from distill_llm.data.view import StudentView
from distill_llm.models.load import LoadedModel, build_student, load_tokenizer
from distill_llm.objective import Objective
from distill_llm.pipeline.arms import needed_targets
from distill_llm.pipeline.cache_stage import missing_rows, plan_caches
from distill_llm.pipeline.capture_stage import captured_teachers, plan_captures, write_capture
from distill_llm.pipeline.pictures import findings_of_pictures
from distill_llm.pipeline.publish import licence_warnings
from distill_llm.pipeline.rationale_stage import Material, check, read_material
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.student_stage import check_chat, check_positions, training_text
from distill_llm.pipeline.trial import open_teachers, student_view
from distill_llm.pipeline.views import TeacherViewer, facts_of_views, make_viewers, repeaters
from distill_llm.recipe.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

Level = Literal["ok", "warning", "error"]
_EXAMPLES = 2000  # whose inputs and targets are measured
_TOO_MANY_CUT = 0.05
_TOO_MANY_UNMATCHED = 0.5
_END_OF_PROMPT = 300  # characters of a teacher's view that are shown


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    what: str
    said: str


@dataclass(frozen=True, slots=True)
class TermFacts:
    """A term at step 0, on one micro-batch: its mean loss, and the norm of its weighted gradient."""

    name: str
    loss: float
    gradient_norm: float
    tokens: int


@dataclass(slots=True)
class Diagnosis:
    """All findings; ``rows`` are texts of one micro-batch with the supervised tokens marked."""

    findings: list[Finding] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    terms: list[TermFacts] = field(default_factory=list)

    @property
    def may_run(self) -> bool:
        return all(finding.level != "error" for finding in self.findings)

    def note(self, level: Level, what: str, said: str) -> None:
        self.findings.append(Finding(level, what, said))


def examine(recipe: Recipe) -> Diagnosis:
    """Checks what the recipe names, then builds the student and its teachers and takes the measure of one step.

    Trains nothing, writes nothing, asks no teacher of text. Where rationales are not there yet, the data's own or a
    stand-in takes their place, and a finding says so.
    """
    diagnosis = Diagnosis()
    try:
        splits = check(recipe)
        diagnosis.note("ok", "recipe", "files, models, tokenizers and teachers that it names can be had")
        _licences(recipe, diagnosis)
        material = _material(recipe, splits, diagnosis)
        tokenizer = load_tokenizer(recipe.student, training_text(recipe, material))
        student = build_student(recipe.student, tokenizer)
        check_chat(recipe, tokenizer)
        view = student_view(recipe, tokenizer, student.is_encoder_decoder, student.painter)
        check_positions(recipe, student.model.config, view)
        viewers = make_viewers(recipe, student, view)
        rows = _rows(recipe, material, view, viewers)
        _views(recipe, rows, viewers, diagnosis)
        if student.painter is not None:
            for level, said in findings_of_pictures(student.painter, rows.rows):
                diagnosis.note(level, "pictures", said)
        _cuts(recipe, rows, diagnosis)
        with TemporaryDirectory() as folder:
            recipe = _with_captures(recipe, material, rows, tokenizer, Path(folder), diagnosis)
            _one_step(recipe, student, rows, diagnosis)
    except DistillError as error:
        diagnosis.note("error", "recipe", str(error))
    return diagnosis


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
    for name in repeaters(recipe):
        diagnosis.note(
            "warning",
            f"view of {name}",
            "it is told the gold label and asked for it: on the target label it can only repeat it, which "
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


def _one_step(recipe: Recipe, student: LoadedModel, rows: RowSet, diagnosis: Diagnosis) -> None:
    from distill_llm.models.generate import default_device
    from distill_llm.training.arguments import rows_per_batch
    from distill_llm.training.precision import choose_precision
    from distill_llm.training.train import collator_for

    student.model.to(default_device())
    computes = choose_precision(recipe.train.precision, student.model)
    diagnosis.note("ok", "precision", f"a training computes in {computes.name}: {computes.why}")
    recipe = _with_caches_that_can_be_read(recipe, student, rows, diagnosis)
    if not recipe.objective:
        return
    teachers = open_teachers(recipe, recipe.objective, student)
    number = rows_per_batch(recipe.train)
    if recipe.train.tokens_per_batch:
        number = max(1, recipe.train.tokens_per_batch // max(row.num_tokens for row in rows.rows))
    chosen = _mixed(rows, number)
    collated = collator_for(student, teachers, recipe.train.packing)(chosen)
    batch = {name: column.to(student.model.device) for name, column in collated.items()}
    diagnosis.rows = [_marked(batch, number, row, student.tokenizer) for number, row in enumerate(chosen[:4])]
    _teachers_are_still(recipe, teachers, batch, diagnosis)
    student.model.train()
    for objective in _term_by_term(recipe):
        diagnosis.terms.append(_term(recipe, objective, student, teachers, batch))
    for facts in diagnosis.terms:
        if not facts.loss < float("inf"):
            diagnosis.note("error", f"term {facts.name}", f"its loss at step 0 is {facts.loss}")
        elif facts.tokens and facts.gradient_norm == 0 and facts.name not in _taught_by_moving(recipe, teachers):
            diagnosis.note("error", f"term {facts.name}", "it has no gradient: nothing would be learned from it")
    said = _memory(recipe, student, teachers, batch)
    diagnosis.note("ok", "memory", f"one micro-batch of {len(chosen)} rows, forward and backward: {said}")


def _with_caches_that_can_be_read(recipe: Recipe, student: LoadedModel, rows: RowSet, diagnosis: Diagnosis) -> Recipe:
    """Says how each cache stands; where one lacks rows, the teacher that it is made of takes its place here."""
    teachers = dict(recipe.teachers)
    for plan in plan_caches(recipe, rows.rows, student.tokenizer.get_vocab()):
        what = f"cache {plan.name}"
        try:
            missing = missing_rows(plan)
        except DistillError as error:
            diagnosis.note("error", what, str(error))
            missing = len(plan.rows)
        else:
            of = f"{len(plan.rows):,} rows"
            if missing:
                do = "`distill-llm run` writes it; before `distill-llm train` type: distill-llm cache-signals RECIPE"
                diagnosis.note("warning", what, f"{plan.folder} lacks {missing:,} of {of}. {do}")
            else:
                diagnosis.note("ok", what, f"{plan.folder} is that of the recipe, undamaged, and has all of {of}")
        if missing:
            teachers[plan.name] = teachers[plan.spec.of]
    return recipe.model_copy(update={"teachers": teachers})


def _taught_by_moving(recipe: Recipe, teachers: Mapping[str, Any]) -> set[str]:
    """Terms whose teacher moves with the student: at step 0 the two may be one, and have nothing to say."""
    from distill_llm.teachers.base import MovingTeacher

    def moves(name: str) -> bool:
        members = recipe.teachers[name].members()
        return isinstance(teachers[name], MovingTeacher) or (bool(members) and all(map(moves, members)))

    return {term.name for term in recipe.objective if term.teacher is not None and moves(term.teacher)}


def _mixed(rows: RowSet, number: int) -> list[Any]:
    """The longest rows of each target in turn: what fits for them fits for all."""
    by_target: dict[str, list[Any]] = {}
    for row in sorted(rows.rows, key=lambda row: -row.num_tokens):
        by_target.setdefault(row.target, []).append(row)
    chosen: list[Any] = []
    while len(chosen) < min(number, len(rows.rows)):
        for waiting in by_target.values():
            if waiting and len(chosen) < number:
                chosen.append(waiting.pop(0))
    return chosen


def _term_by_term(recipe: Recipe) -> Iterator[Objective]:
    for term in recipe.objective:
        yield Objective([term]).at(0.0)


def _term(
    recipe: Recipe, objective: Objective, student: LoadedModel, teachers: Mapping[str, Any], batch: Batch
) -> TermFacts:
    counts = objective.counts(batch)
    student.model.zero_grad(set_to_none=True)
    loss, means = _loss(recipe, objective, student, teachers, batch, counts)
    loss.backward()
    squares = [weight.grad.float().square().sum() for weight in student.model.parameters() if weight.grad is not None]
    student.model.zero_grad(set_to_none=True)
    name = objective.terms[0].name
    return TermFacts(name, float(means[name]), float(sum(squares)) ** 0.5, int(counts[0]))


def _loss(
    recipe: Recipe,
    objective: Objective,
    student: LoadedModel,
    teachers: Mapping[str, Any],
    batch: Batch,
    counts: Tensor,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    from distill_llm.models.head import OutputHead

    chunk_tokens = recipe.train.chunk_tokens
    head = OutputHead(student.model, chunk_tokens=chunk_tokens) if chunk_tokens else None  # as the trainer does it
    pairs = recipe.scheme.compare(student.model, teachers, batch, objective, head=head)
    results = [objective(said, taught, counts) for said, taught in pairs]
    return sum((loss for loss, _ in results[1:]), results[0][0]), results[0][1]


def _teachers_are_still(recipe: Recipe, teachers: Mapping[str, Any], batch: Batch, diagnosis: Diagnosis) -> None:
    """A teacher must say the same twice, and pass no gradient on: dropout or weights that learn would show."""
    import torch

    objective = Objective(recipe.objective)
    on_disk = {name for name, teacher in recipe.teachers.items() if teacher.asked_once}
    for name, teacher in teachers.items():
        asked = objective.rows_for(name, batch)
        if name in on_disk and not bool(asked.any()):
            continue  # it knows the rows that it is asked about, and no others
        part = select_rows(batch, asked) if bool(asked.any()) else batch
        said = teacher.signals(part), teacher.signals(part)
        first, second = (one.logits if isinstance(one, Signals) else one.likeliest() for one in said)
        if first.requires_grad:
            diagnosis.note("error", f"teacher {name}", "its logits carry a gradient: it would be trained too")
        elif not torch.equal(first, second):
            diagnosis.note("error", f"teacher {name}", "it says something else when asked twice: is dropout on?")
        else:
            diagnosis.note("ok", f"teacher {name}", "passes no gradient on, and says the same twice")


def _memory(recipe: Recipe, student: LoadedModel, teachers: Mapping[str, Any], batch: Batch) -> str:
    """The peak of one forward and backward pass of the whole objective."""
    import torch

    objective = Objective(recipe.objective).at(0.0)
    on_gpu = student.model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = _peak_bytes()
    loss, _ = _loss(recipe, objective, student, teachers, batch, objective.counts(batch))
    loss.backward()
    student.model.zero_grad(set_to_none=True)
    if on_gpu:
        return f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB on the GPU, weights and teachers included"
    more = _peak_bytes() - before
    return f"{_peak_bytes() / 2**20:,.0f} MiB at most in this process, {more / 2**20:,.0f} MiB of it for this pass"


def _peak_bytes() -> int:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _marked(batch: Batch, number: int, row: Row, tokenizer: Any) -> str:
    """A row as text, as the model gets it, and behind an arrow its supervised tokens, each between bars."""
    labels = batch["labels"][number]
    supervised = labels[labels != IGNORE_INDEX].tolist()
    prefix: list[int] = []
    if row.picture is not None:
        read = f"[picture: {row.picture.text or 'its image'}]"
    else:
        inputs = batch["input_ids"][number][batch["attention_mask"][number].bool()].tolist()
        read = tokenizer.decode(inputs if "decoder_input_ids" in batch else inputs[: len(inputs) - len(supervised)])
    if "decoder_input_ids" in batch:
        begin = int((labels != IGNORE_INDEX).int().argmax())
        prefix = batch["decoder_input_ids"][number][1 : begin + 1].tolist()
    written = f"{tokenizer.decode(prefix)} {_bars(supervised, tokenizer)}".lstrip()
    return f"{read}  ->  {written}"


def _bars(ids: Sequence[int], tokenizer: Any) -> str:
    return "|" + "|".join(tokenizer.decode([token]) for token in ids) + "|"
