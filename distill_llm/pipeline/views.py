"""Rows as teachers with a view of their own read them: their prompts, and their tokens beside the student's."""

from __future__ import annotations

import heapq
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distill_llm.core.errors import ConfigError, DataError
from distill_llm.core.example import Example, Target
from distill_llm.data.alignment import places_by_position, places_by_text, token_starts
from distill_llm.data.rows import Row, RowView
from distill_llm.data.view import StudentView
from distill_llm.models.load import LoadedModel, context_tokens
from distill_llm.models.picture import Painter, Picture, check_image
from distill_llm.models.prompt_tokens import prompt_ids
from distill_llm.rationales.prompts import Prompter, hinted, make_prompter
from distill_llm.tasks.wording import bare_question
from distill_llm.teachers.base import Prompt, with_members
from distill_llm.teachers.prompt import PromptSpec
from distill_llm.teachers.student import reads_otherwise
from distill_llm.teachers.view import PLACES, Reader, TeacherView

if TYPE_CHECKING:
    from distill_llm.recipe.recipe import Recipe

_LONGEST = 32  # prompts whose tokens are counted before anything is loaded: the longest by characters


@dataclass(frozen=True, slots=True)
class TeacherViewer:
    """Reads rows as teacher ``name`` does. ``student`` says how the student's targets were tokenised."""

    name: str
    recipe: Recipe
    reader: Reader
    prompter: Prompter
    student: StudentView
    _read: dict[str, array[int]] = field(default_factory=dict)

    def reads(self, target: Target) -> bool:
        return target in targets_asked(self.recipe, self.name)

    def views(
        self, examples: Sequence[Example], target: Target, texts: Sequence[str], labels: Sequence[Sequence[int]]
    ) -> list[RowView | None]:
        """None for an example without what the view tells of it. Raises DataError where one is too long."""
        found: list[RowView | None] = []
        prefix = decoder_prefix(self.recipe, self.reader, target)
        for example, (own, places) in zip(examples, self._targets(texts, labels), strict=True):
            if not _may_be_told(self.reader.view, example):
                found.append(None)
                continue
            where = f"teachers.{self.name}.view: example '{example.id}'"
            picture = None
            if self.reader.painter is not None:
                prompt = render(self.recipe, self.reader.view, self.prompter, example, target)
                picture = picture_of(self.reader.painter, prompt, example, where)
            inputs: Sequence[int] = ()
            if self.reader.reads_text:
                inputs = self._inputs(example, target, where)
                _check_length(inputs, own, self.reader, where)
            found.append(RowView(inputs, own, places, prefix, picture))
        return found

    def _inputs(self, example: Example, target: Target, where: str) -> array[int]:
        """Shared by all rows of an example that are read alike."""
        prompt = render(self.recipe, self.reader.view, self.prompter, example, target)
        key = f"{example.id} {prompt if isinstance(prompt, str) else prompt[-1].content}"
        if key not in self._read:
            self._read[key] = array("i", input_ids(self.reader, prompt, where))
        return self._read[key]

    def _targets(
        self, texts: Sequence[str], labels: Sequence[Sequence[int]]
    ) -> list[tuple[Sequence[int], Sequence[int]]]:
        """The teacher's tokens of each target, and where the student's tokens have their counterparts among them."""
        if not self.reader.align:
            return [(ids, range(len(ids))) for ids in labels]
        where = f"teachers.{self.name}.align"
        config = self.reader.config
        reader = StudentView(
            tokenizer=self.reader.tokenizer,
            is_encoder_decoder=config.is_encoder_decoder,
            prefixes=self.student.prefixes,
            chat=False,
            max_input_tokens=self.student.max_input_tokens,
            max_target_tokens=sys.maxsize,  # the student's limit cuts, below
        )
        own, _ = reader.targets(texts)
        if self.reader.align == "position":
            places = [places_by_position(len(ids), len(other)) for ids, other in zip(labels, own, strict=True)]
        else:
            of_student = token_starts(
                self.student.tokenizer, texts, special=self.student.is_encoder_decoder, where=where
            )
            of_teacher = token_starts(self.reader.tokenizer, texts, special=config.is_encoder_decoder, where=where)
            places = [
                places_by_text(starts[: len(ids)], others)
                for ids, starts, others in zip(labels, of_student, of_teacher, strict=True)
            ]
        return [(ids[: max(at, default=0) + 1], at) for ids, at in zip(own, places, strict=True)]


def make_viewers(recipe: Recipe, student: LoadedModel, view: StudentView) -> dict[str, TeacherViewer]:
    """One for each teacher that is asked by some term and does not read what the student reads."""
    prompters = view_prompters(recipe)
    found = {}
    for name, teacher in recipe.teachers.items():
        reader = teacher.reader(student) if is_asked(recipe, name) else None
        if reader is not None:
            _check_tokenizer(reader, name)
            found[name] = TeacherViewer(name, recipe, reader, prompters[name], view)
    return found


def check_views(recipe: Recipe, examples: Sequence[Example]) -> None:
    """Raises ConfigError or DataError where a teacher's view of training examples cannot be had. Loads no weights."""
    _check_modalities(recipe)
    for name, prompter in view_prompters(recipe).items():
        view, where = recipe.teachers[name].own_view(), f"teachers.{name}.view"
        if view is None or not is_asked(recipe, name):
            continue
        known = [example for example in examples if _may_be_told(view, example)]
        if view.gold_label and all(example.label is None for example in examples):
            raise DataError(f"{where}.gold_label: no training example has a gold label. Set gold_label: false.")
        reader = recipe.teachers[name].reader()
        if reader is None:  # it is made of a student that is not there yet
            continue
        _check_tokenizer(reader, name)
        for example in heapq.nlargest(_LONGEST, known, key=lambda example: len(example.prompt)):
            for target in targets_asked(recipe, name):
                prompt, whose = render(recipe, view, prompter, example, target), f"{where}: example '{example.id}'"
                if reader.painter is not None:
                    picture_of(reader.painter, prompt, example, whose)
                if reader.reads_text:
                    _check_length(input_ids(reader, prompt, whose), (), reader, whose)


def _check_modalities(recipe: Recipe) -> None:
    """Raises ConfigError where a teacher without a view reads text and the student pictures, or the other way round."""
    for name, teacher in recipe.teachers.items():
        if is_asked(recipe, name) and teacher.own_view() is None:
            sees = teacher.sees()
            if sees is not None and sees != (recipe.student.picture is not None):
                raise ConfigError(reads_otherwise(f"teachers.{name}", teacher_sees=sees))


def view_prompters(recipe: Recipe) -> dict[str, Prompter]:
    """What frames a question, for each teacher with a view of its own. Raises ConfigError where its exemplars are not
    there."""
    found = {}
    for name, teacher in recipe.teachers.items():
        view = teacher.own_view()
        if view is not None:
            shared = view.model_dump(include={"exemplars", "num_exemplars", "style", "system"})
            found[name] = make_prompter(PromptSpec(**shared), where=f"teachers.{name}.view")
    return found


def render(recipe: Recipe, view: TeacherView, prompter: Prompter, example: Example, target: Target) -> Prompt:
    """What a teacher reads of an example where the student is to write ``target``."""
    question, text, told = "", example.input, []
    if view.rationale and example.rationale is not None:
        told.append(example.rationale)
    if view.gold_label and example.label is not None:
        told.append(recipe.task.answer_sentence(example.label, example))
    if told:
        answer = " ".join(told)
        question, text = (hinted(view.hint, asked, answer) for asked in (bare_question(example.prompt), text))
    prefix = recipe.student.prefixes.of(target) if view.prefix_side == "encoder" else ""
    parts = {"prompt": prompter.question(example, question), "input": prefix + text}
    return prompter.framed(PLACES.sub(lambda found: parts[found[1]], view.template))


def input_ids(reader: Reader, prompt: Prompt, where: str) -> list[int]:
    """As the student's view makes them: a text that is continued ends with a line, and with no end of sequence.

    Raises DataError where a picture has no single place in it.
    """
    continued = not reader.config.is_encoder_decoder
    if continued and isinstance(prompt, str) and not prompt.endswith("\n"):
        prompt = f"{prompt}\n"
    ids = prompt_ids(reader.tokenizer, prompt)
    if continued and ids and ids[-1] == reader.tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids if reader.painter is None else _with_places(ids, reader, reader.painter, where)


def _with_places(ids: list[int], reader: Reader, painter: Painter, where: str) -> list[int]:
    """A picture stands where the text names it, such as by <image>; elsewhere before the text."""
    place = painter.place_id
    assert place is not None, "a model that reads pictures alone gets no text"
    named = ids.count(place)
    if named > 1:
        word = reader.tokenizer.convert_ids_to_tokens(place)
        raise DataError(f"{where}: {word} stands {named} times in it, for one picture. Leave one of them.")
    at = ids.index(place) if named else int(bool(ids) and ids[0] == reader.tokenizer.bos_token_id)
    return [*ids[:at], *painter.places, *ids[at + named :]]


def picture_of(painter: Painter, prompt: Prompt, example: Example, where: str) -> Picture:
    """What a teacher sees. Raises DataError where some of it would be missing."""
    assert isinstance(prompt, str), "a chat is not drawn: the view was checked"
    if painter.spec.source == "data":
        check_image(example.picture, where)
    picture = painter.picture(prompt, example.picture)
    if not painter.is_whole(picture):
        unknown = painter.unknown(prompt)
        what = f"has the characters {unknown[:8]}, which its font lacks" if unknown else "has no room for its text"
        raise DataError(f"{where} makes a picture that {what}. Change `picture` (size, font), or the view's text.")
    return picture


def decoder_prefix(recipe: Recipe, reader: Reader, target: Target) -> Sequence[int]:
    """What a teacher's decoder reads before the target, as the view of a student of its kind has it."""
    view = StudentView(
        tokenizer=reader.tokenizer,
        is_encoder_decoder=True,
        prefixes=recipe.student.prefixes,
        chat=False,
        max_input_tokens=reader.view.max_input_tokens,
        max_target_tokens=sys.maxsize,
        prefix_side=reader.view.prefix_side,
    )
    return view.decoder_prefix(target)


def is_asked(recipe: Recipe, name: str) -> bool:
    """Whether some term names this teacher, or one that it is a member of."""
    return bool(targets_asked(recipe, name))


def repeaters(recipe: Recipe) -> list[tuple[str, Target]]:
    """Teachers that are told the very text that they are asked for, with its target: what they say of it is trivially
    right. A rationale that the student is to write in words of its own is another text."""
    found: list[tuple[str, Target]] = []
    for name, teacher in recipe.teachers.items():
        view, asked = teacher.own_view(), targets_asked(recipe, name)
        if view and view.gold_label and "label" in asked:
            found.append((name, "label"))
        if view and view.rationale and "rationale" in asked and not recipe.scheme.written_tokens("rationale"):
            found.append((name, "rationale"))
    return found


def check_room(recipe: Recipe, rows: Sequence[Row], student: LoadedModel) -> None:
    """Raises ConfigError where student, or a teacher with a view, has no room for the texts that the student writes."""
    context = None if student.is_encoder_decoder else context_tokens(student.model.config)
    readers = {name: teacher.reader(student) for name, teacher in recipe.teachers.items() if is_asked(recipe, name)}
    for row in rows:
        new = recipe.scheme.written_tokens(row.target)
        if not new or not any(row.target in term.targets for term in recipe.objective if term.teacher is not None):
            continue
        _check_room(len(row.input_ids), new, context, "the student")
        for name, view in row.views.items():
            reader = readers[name]
            assert reader is not None, "it has a view"
            limit = None if reader.config.is_encoder_decoder else context_tokens(reader.config)
            _check_room(len(view.input_ids), new, limit, f"teacher {name}")


@dataclass(frozen=True, slots=True)
class ViewFacts:
    """What became of a teacher's view over all rows that it is asked about, of ``num_tokens`` student tokens.

    ``untold`` rows have no gold label or rationale to be told; ``unmatched`` tokens have no counterpart, these rows'
    included.
    """

    num_rows: int
    num_tokens: int
    untold: int
    unmatched: int
    longest: int

    def __str__(self) -> str:
        said = f"reads up to {self.longest:,} tokens a row"
        if self.untold:
            said += f"; says nothing of {self.untold:,} of {self.num_rows:,} rows, of which it cannot be told enough"
        if self.unmatched:
            share = self.unmatched / self.num_tokens
            said += f"; {self.unmatched:,} of {self.num_tokens:,} tokens have no counterpart ({share:.1%})"
        return said


def facts_of_views(recipe: Recipe, rows: Sequence[Row]) -> dict[str, ViewFacts]:
    """By teacher, of those that are asked."""
    found = {}
    for name in recipe.teachers:
        asked = [row for row in rows if row.target in targets_asked(recipe, name)]
        views = [(row, row.views[name]) for row in asked if name in row.views]
        if views:
            tokens = sum(len(row.label_ids) for row in asked)
            matched = sum(place >= 0 for _, view in views for place in view.places)
            longest = max(view.num_tokens for _, view in views)
            found[name] = ViewFacts(len(asked), tokens, len(asked) - len(views), tokens - matched, longest)
    return found


def targets_asked(recipe: Recipe, name: str) -> frozenset[Target]:
    """Those of which some term asks this teacher, or one that it is a member of."""
    return frozenset(
        target
        for term in recipe.objective
        if term.teacher is not None and name in with_members(recipe.teachers, term.teacher)
        for target in term.targets
    )


def _may_be_told(view: TeacherView, example: Example) -> bool:
    """Whether the example has what the view tells of it."""
    return (example.label is not None or not view.gold_label) and (example.rationale is not None or not view.rationale)


def _check_room(inputs: int, new: int, context: int | None, whose: str) -> None:
    if context is not None and inputs + new > context:
        raise ConfigError(
            f"scheme.max_new_tokens: {new:,} tokens behind an input of {inputs:,} are more than {whose} takes "
            f"({context:,}). Lower it, or cut inputs with `train.max_input_tokens`."
        )


def _check_tokenizer(reader: Reader, name: str) -> None:
    if reader.view.prefix_side == "decoder" and not reader.config.is_encoder_decoder:
        raise ConfigError(f"teachers.{name}.view.prefix_side: the teacher is decoder-only. Remove it.")
    if reader.view.style == "chat" and not reader.tokenizer.chat_template:
        raise ConfigError(
            f"teachers.{name}.view.style: chat: the teacher's tokenizer has no chat template. Set style: text."
        )
    if reader.align == "text":
        token_starts(reader.tokenizer, [], special=False, where=f"teachers.{name}")


def _check_length(inputs: Sequence[int], labels: Sequence[int], reader: Reader, where: str) -> None:
    if len(inputs) > reader.view.max_input_tokens:
        raise DataError(
            f"{where} makes a prompt of {len(inputs):,} tokens, more than max_input_tokens, "
            f"{reader.view.max_input_tokens:,}. Take fewer exemplars (num_exemplars), or raise it."
        )
    context = context_tokens(reader.config)
    both = len(inputs) + (0 if reader.config.is_encoder_decoder else len(labels))
    if context is not None and both > context:
        raise DataError(
            f"{where} makes a prompt of {len(inputs):,} tokens and a target of {len(labels):,}, but the teacher takes "
            f"{context:,}. Take fewer exemplars (num_exemplars), or another teacher."
        )
