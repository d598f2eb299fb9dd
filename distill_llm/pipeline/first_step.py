"""What the first step of a training is like, on one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import DistillError
from distill_llm.core.signals import IGNORE_INDEX, Batch, Signals, select_rows
from distill_llm.data.rows import Row, RowSet
from distill_llm.models.load import LoadedModel
from distill_llm.models.peers import members_of
from distill_llm.objective import Objective
from distill_llm.pipeline.cache_stage import missing_rows, plan_caches
from distill_llm.pipeline.diagnosis import Diagnosis, TermFacts
from distill_llm.pipeline.place import peak_bytes
from distill_llm.pipeline.trial import open_teachers
from distill_llm.recipe.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


def examine_step(recipe: Recipe, student: LoadedModel, rows: RowSet, diagnosis: Diagnosis) -> None:
    """Adds to ``diagnosis`` what one micro-batch is like: its rows, its teachers, each term, and its memory."""
    from distill_llm.models.generate import default_device
    from distill_llm.training.arguments import rows_per_batch
    from distill_llm.training.precision import choose_precision
    from distill_llm.training.train import collator_for

    student.model.to(default_device())
    computes = choose_precision(recipe.train.precision, student.model)
    diagnosis.note("ok", "precision", f"a training computes in {computes.name}: {computes.why}")
    instead = _instead_of_caches(recipe, student, rows, diagnosis)
    recipe = recipe.model_copy(
        update={"teachers": recipe.teachers | {n: recipe.teachers[of] for n, of in instead.items()}}
    )
    if not recipe.objective:
        return
    teachers = open_teachers(recipe, recipe.objective, student)
    number = rows_per_batch(recipe.train)
    if recipe.train.tokens_per_batch:
        number = max(1, recipe.train.tokens_per_batch // max(row.num_tokens for row in rows.rows))
    chosen = [_as_read_by(instead, row) for row in _mixed(rows, number)]
    collated = collator_for(student, teachers, recipe.train.packing)(chosen)
    batch = {name: column.to(student.model.device) for name, column in collated.items()}
    diagnosis.rows = [_marked(batch, number, row, student.tokenizer) for number, row in enumerate(chosen[:4])]
    _teachers_are_still(recipe, teachers, batch, diagnosis)
    student.model.train()
    for objective in recipe.scheme.for_learners(Objective(recipe.objective).at(0.0)).one_by_one():
        diagnosis.terms.append(_term(recipe, objective, student, teachers, batch))
    for facts in diagnosis.terms:
        if not facts.loss < float("inf"):
            diagnosis.note("error", f"term {facts.name}", f"its loss at step 0 is {facts.loss}")
        elif facts.tokens and facts.gradient_norm == 0 and facts.name not in _taught_by_moving(recipe, teachers):
            diagnosis.note("error", f"term {facts.name}", "it has no gradient: nothing would be learned from it")
    said = _memory(recipe, student, teachers, batch)
    diagnosis.note("ok", "memory", f"one micro-batch of {len(chosen)} rows, forward and backward: {said}")


def _instead_of_caches(recipe: Recipe, student: LoadedModel, rows: RowSet, diagnosis: Diagnosis) -> dict[str, str]:
    """Says how each cache stands; of one that lacks rows, the teacher that takes its place here."""
    instead = {}
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
            instead[plan.name] = plan.spec.of
    return instead


def _as_read_by(instead: Mapping[str, str], row: Row) -> Row:
    """The row, with what a teacher reads of it under the name of the cache whose place it takes too."""
    shown = {name: row.views[of] for name, of in instead.items() if of in row.views}
    return replace(row, views={**row.views, **shown})


def _taught_by_moving(recipe: Recipe, teachers: Mapping[str, Any]) -> set[str]:
    """Terms whose teacher moves with the student: at step 0 the two may be one, and have nothing to say."""
    from distill_llm.teachers.base import MovingTeacher

    def moves(name: str) -> bool:
        members = recipe.teachers[name].members()
        return isinstance(teachers[name], MovingTeacher) or (bool(members) and all(map(moves, members)))

    objective = recipe.scheme.for_learners(Objective(recipe.objective))
    asked = {term.name: term.teacher for term in objective.terms if term.teacher is not None}
    return {name for name, teacher in asked.items() if teacher in teachers and moves(teacher)}


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
    first = members_of(student.model)[0]
    head = OutputHead(first, chunk_tokens=chunk_tokens) if chunk_tokens else None  # as the trainer does it
    pairs = recipe.scheme.compare(student.model, teachers, batch, objective, head=head)
    learners = zip(recipe.scheme.learners, pairs, strict=True)
    results = [objective(*pair, counts, learner=learner) for learner, pair in learners]
    means = {name: mean for _, some in results for name, mean in some.items()}
    return sum((loss for loss, _ in results[1:]), results[0][0]), means


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

    objective = recipe.scheme.for_learners(Objective(recipe.objective).at(0.0))
    on_gpu = student.model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = peak_bytes()
    loss, _ = _loss(recipe, objective, student, teachers, batch, objective.counts(batch))
    loss.backward()
    student.model.zero_grad(set_to_none=True)
    if on_gpu:
        return f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB on the GPU, weights and teachers included"
    more = peak_bytes() - before
    return f"{peak_bytes() / 2**20:,.0f} MiB at most in this process, {more / 2**20:,.0f} MiB of it for this pass"


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
