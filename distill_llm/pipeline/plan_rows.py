"""The rows that a plan is made for: those that the student will read, as far as they can be known beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill_llm.core.example import Example, Splits, TeacherAnswer
from distill_llm.data.rows import Row, build_rows
from distill_llm.models.load import build_student, load_tokenizer, read_tokenizer
from distill_llm.pipeline.arms import needed_targets
from distill_llm.pipeline.rationale_stage import Material, read_material
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.student_stage import check_chat, check_positions, training_text
from distill_llm.pipeline.transfer import transferred
from distill_llm.pipeline.trial import student_view
from distill_llm.pipeline.views import make_viewers
from distill_llm.recipe.recipe import Recipe

_EXAMPLES = 2000  # whose rows stand for all


@dataclass(frozen=True, slots=True)
class PlanRows:
    """``rows`` are of some examples; all of the training split make ``times`` as many. ``source`` is for people.

    ``tokenizer`` is the student's, which lies in ``folder`` too.
    """

    rows: Sequence[Row]
    times: float
    source: str
    tokenizer: Any
    folder: Path


def plan_rows(recipe: Recipe, splits: Splits, folder: Path) -> PlanRows:
    """Rows of rationales that are there, else of the data's own, else of the longest that a recipe allows.

    ``folder`` takes the tokenizer. Raises DistillError where the recipe's own training would.
    """
    from distill_llm.models.dry_run import dry

    material, source = _material(recipe, splits)
    material = transferred(recipe, material)
    run = RunFolder(recipe.folder)
    if run.tokenizer.exists():
        tokenizer = read_tokenizer(str(run.tokenizer), where="student.tokenizer")
    else:
        tokenizer = load_tokenizer(recipe.student, training_text(recipe, material))
    tokenizer.save_pretrained(str(folder))
    check_chat(recipe, tokenizer)
    some = material.splits.train[:_EXAMPLES]
    answers = material.answers
    if source.startswith("as long"):
        answers = {example.id: _long(answers[example.id], recipe.train.max_target_tokens) for example in some}
    with dry():
        student = build_student(recipe.student, tokenizer)
        view = student_view(recipe, tokenizer, student.is_encoder_decoder, student.painter)
        check_positions(recipe, student.model.config, view)
        viewers = make_viewers(recipe, student, view)
        built = build_rows(
            some,
            answers,
            task=recipe.task,
            view=view,
            targets=needed_targets(recipe),
            label_from=recipe.label_from,
            viewers=viewers,
        )
    rows = [_written(recipe, row) for row in built.rows]
    return PlanRows(rows, len(material.splits.train) / max(1, len(some)), source, tokenizer, folder)


def _material(recipe: Recipe, splits: Splits) -> tuple[Material, str]:
    found = read_material(recipe, splits, RunFolder(recipe.folder))
    if found is not None:
        return found, "the run's own" if recipe.rationales is not None else "the data's labels"
    asked = {target for target in needed_targets(recipe) if target != "label"}
    told = all(example.rationale is not None for example in splits.train)
    answers = {example.id: _stand_in(example) for example in splits.train}
    if not asked:
        return Material(splits, answers, {}), "the data's inputs; labels are not written yet"
    if told:
        return Material(splits, answers, {}), "the data's own rationales, as others are not written yet"
    longest = recipe.train.max_target_tokens
    return Material(splits, answers, {}), (
        f"as long as train.max_target_tokens={longest} allows, as no rationale is written yet"
    )


def _stand_in(example: Example) -> TeacherAnswer:
    label = example.label if example.label is not None else next(iter(example.choices), "?")
    return TeacherAnswer(label, (example.rationale or example.input,), 1.0)


def _long(answer: TeacherAnswer, tokens: int) -> TeacherAnswer:
    """With a rationale of so many words, and so of no fewer tokens."""
    words = answer.rationales[0].split() or ["?"]
    return replace(answer, rationales=(" ".join((words * (tokens // len(words) + 1))[:tokens]),))


def _written(recipe: Recipe, row: Row) -> Row:
    """As long as a text that the student itself may write in its place."""
    longest = recipe.scheme.written_tokens(row.target)
    ids = list(row.label_ids)
    return (
        replace(row, label_ids=ids + ids[-1:] * (longest - len(ids))) if longest > len(ids) and not row.views else row
    )


def largest(batches: Iterable[Sequence[int]], rows: Sequence[Row]) -> Sequence[int]:
    """The micro-batch with the most tokens, padding included."""
    return max(batches, key=lambda batch: padded_tokens([rows[index] for index in batch]))


def padded_tokens(rows: Sequence[Row]) -> int:
    return len(rows) * sum(widths(rows))


def widths(rows: Sequence[Row]) -> tuple[int, int]:
    """Tokens of the longest input, and of the longest target."""
    return max(row.num_input_tokens for row in rows), max(row.num_target_tokens for row in rows)


def tokens_of(rows: Sequence[Row]) -> Mapping[str, int]:
    """Supervised tokens by target."""
    found: dict[str, int] = {}
    for row in rows:
        found[row.target] = found.get(row.target, 0) + len(row.label_ids)
    return found
