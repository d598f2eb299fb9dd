"""A teacher with a view of its own says what its model says when it is fed by hand, at the student's tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from distill_llm.core.example import Example, TeacherAnswer
from distill_llm.core.signals import Batch, model_inputs, select_rows, signals_of, view_column
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row, build_rows
from distill_llm.models.head import OutputHead
from distill_llm.objective import Objective
from distill_llm.pipeline.trial import open_teachers, student_view
from distill_llm.pipeline.views import facts_of_views, make_viewers
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.base import LazyTeacher, MovingTeacher
from distill_llm.training.train import collator_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from distill_llm.models.load import LoadedModel
    from distill_llm.recipe.recipe import Recipe
    from distill_llm.teachers.base import TensorTeacher

YAML = """
name: tiny
task: {kind: jsonl, data: unread.jsonl, fields: {input: question}}
rationales: {teacher: {kind: gold}}
student: {model: a/b}
teachers:
  big: {kind: frozen, model: FOLDER/big, view: {exemplars: FOLDER/shown.yaml, gold_label: true}}
  plain: {kind: frozen, model: FOLDER/big}
  same: {kind: frozen, model: FOLDER/big, view: {template: "{input}"}}
  own: {kind: ema, decay: 0.9, view: {template: "{input}", gold_label: true, hint: "{answer} {question}"}}
  pair: {kind: ensemble, of: [big, plain], weights: [3, 1]}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: soft, loss: {kind: forward_kl}, targets: [rationale], teacher: TEACHER}
train: {max_steps: 2}
"""
SHOWN = [{"question": "what costs 3 ?", "rationale": "a costs 3 .", "answer": "The answer is a."}]
HEAD = "Q: what costs 3 ?\nA: a costs 3 . The answer is a.\n\n"
EXAMPLES = [
    Example("one", "who pays more ?", "Q: who pays more ?\nA:", label="ann"),
    Example("two", "what costs 1 and what costs 2 ?", "Q: what costs 1 and what costs 2 ?\nA:", label="b"),
    Example("three", "who ?", "Q: who ?\nA:", label="bob"),
]
ANSWERS = {
    "one": TeacherAnswer("ann", ("ann pays 2 because 1 + 1 = 2 .", "ann pays ."), 1.0),
    "two": TeacherAnswer("b", ("a costs 1 .",), 1.0),
    "three": TeacherAnswer("bob", ("bob and then so .",), 1.0),
}
TOLD = [
    HEAD + f"Q: {example.input}\n(Hint: The answer is {example.label}.)\nA:" for example in EXAMPLES
]  # what teacher `big` reads of each


def _recipe(folder: Path, *, asked: str = "big", objective: str = "") -> Recipe:
    (folder / "shown.yaml").write_text(yaml.safe_dump(SHOWN))
    text = YAML.replace("FOLDER", str(folder)).replace("TEACHER", asked)
    return recipe_from(parse_yaml(text, "test"), [objective] if objective else [])


def _saved(model: LoadedModel, folder: Path) -> None:
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def _rows(recipe: Recipe, student: LoadedModel, examples: Sequence[Example] = EXAMPLES) -> tuple[Row, ...]:
    view = student_view(recipe, student.tokenizer, student.is_encoder_decoder)
    return build_rows(
        examples,
        ANSWERS,
        task=recipe.task,
        view=view,
        targets=("label", "rationale"),
        label_from="gold",
        viewers=make_viewers(recipe, student, view),
    ).rows


def _opened(
    recipe: Recipe, student: LoadedModel, examples: Sequence[Example] = EXAMPLES
) -> tuple[dict[str, TensorTeacher], tuple[Row, ...], Batch]:
    teachers = open_teachers(recipe, recipe.objective, student)
    rows = _rows(recipe, student, examples)
    return teachers, rows, collator_for(student, teachers)(rows)


def _by_hand(model: LoadedModel, prompt: str, label_ids: Sequence[int]) -> torch.Tensor:
    """Logits of the label's tokens behind a prompt, alone in a batch."""
    ids = model.tokenizer(prompt if model.is_encoder_decoder else f"{prompt}\n")["input_ids"]
    with torch.no_grad():
        if model.is_encoder_decoder:
            start = model.model.config.decoder_start_token_id
            shifted = torch.tensor([[start, *label_ids[:-1]]])
            return model.model(input_ids=torch.tensor([ids]), decoder_input_ids=shifted).logits[0]
        return model.model(input_ids=torch.tensor([[*ids, *label_ids]])).logits[0, len(ids) - 1 : -1]


def _rationales(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.target == "rationale"]


def test_it_says_what_its_model_says_of_the_prompt_that_is_fed_by_hand(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """Exemplars and the gold label in sight; for the rows that it is asked about, in the student's order."""
    student, big = tiny_model(seed=1), tiny_model(seed=2)
    _saved(big, tmp_path / "big")
    recipe = _recipe(tmp_path)
    teachers, rows, batch = _opened(recipe, student)
    asked = Objective(recipe.objective).rows_for("big", batch)
    said = teachers["big"].signals(select_rows(batch, asked))
    wanted = [_by_hand(big, TOLD[row.example], row.label_ids) for row in _rationales(rows)]
    torch.testing.assert_close(said.logits, torch.cat(wanted), atol=1e-5, rtol=1e-4)
    assert said.token_ids.tolist() == [token for row in _rationales(rows) for token in row.label_ids]
    assert said.known is not None
    assert said.known.all()
    assert not said.logits.requires_grad
    plainly = torch.cat([_by_hand(big, EXAMPLES[row.example].input, row.label_ids) for row in _rationales(rows)])
    assert (said.logits - plainly).abs().max() > 1e-3, "what it is shown makes a difference"


def test_lazily_it_says_the_same(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    student = tiny_model(seed=1)
    _saved(tiny_model(seed=2), tmp_path / "big")
    teachers, _, batch = _opened(_recipe(tmp_path), student)
    teacher = teachers["big"]
    assert isinstance(teacher, LazyTeacher)
    lazy, plain = teacher.lazy_signals(batch), teacher.signals(batch)  # label rows too, of which it knows nothing
    for target in (0, 1):
        wanted = plain.of_target(target)
        found = lazy.of_target(target).part(0, len(wanted.targets))
        assert found.token_ids.tolist() == wanted.token_ids.tolist()
        assert found.known is not None
        assert wanted.known is not None
        assert found.known.tolist() == wanted.known.tolist() == [target == 1] * len(wanted.targets)
        torch.testing.assert_close(found.logits[found.known], wanted.logits[wanted.known], atol=1e-5, rtol=1e-4)


def test_a_view_of_the_students_own_input_changes_nothing(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    student = tiny_model(seed=1)
    _saved(tiny_model(seed=2), tmp_path / "big")
    teachers, rows, batch = _opened(_recipe(tmp_path, asked="same"), student)
    assert [list(row.views["same"].input_ids) for row in _rationales(rows)] == [
        list(row.input_ids) for row in _rationales(rows)
    ]
    plain = open_teachers(_recipe(tmp_path, asked="plain"), _recipe(tmp_path, asked="plain").objective, student)
    of_rationales = [teacher["same" if "same" in teacher else "plain"] for teacher in (teachers, plain)]
    found, wanted = (teacher.signals(batch).of_target(1) for teacher in of_rationales)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-5, rtol=1e-4)


def _update(
    recipe: Recipe,
    student: LoadedModel,
    sizes: Sequence[int],
    chunk_tokens: int = 0,
    examples: Sequence[Example] = EXAMPLES,
) -> tuple[torch.Tensor, ...]:
    """The loss of all rows, cut into micro-batches of these sizes, and its gradients."""
    teachers, rows, _ = _opened(recipe, student, examples)
    collate, objective, start = collator_for(student, teachers), Objective(recipe.objective), 0
    batches = []
    for size in sizes:
        batches.append(collate(rows[start : start + size]))
        start += size
    assert start == len(rows)
    counts = torch.stack([objective.counts(batch) for batch in batches]).sum(0)
    head = OutputHead(student.model, chunk_tokens=chunk_tokens) if chunk_tokens else None
    total = torch.zeros(())
    for batch in batches:
        for said, taught in StepByStep().compare(student.model, teachers, batch, objective, head):
            total = total + objective(said, taught, counts)[0]
    weights = [student.model.get_input_embeddings().weight, student.model.get_output_embeddings().weight]
    return (total.detach(), *torch.autograd.grad(total, weights))


@pytest.mark.parametrize("asked", ["big", "pair", "own"])
def test_micro_batches_and_chunks_make_no_difference(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path, asked: str
) -> None:
    student = tiny_model(seed=1)
    _saved(tiny_model(seed=2), tmp_path / "big")
    recipe = _recipe(tmp_path, asked=asked)
    expected = _update(recipe, student, [7])
    assert expected[0] > 1e-3
    for sizes, chunk_tokens in (([1] * 7, 0), ([3, 4], 0), ([7], 3), ([7], 100), ([2, 5], 2)):
        for found, wanted in zip(_update(recipe, student, sizes, chunk_tokens), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("asked", ["big", "pair"])
def test_nor_do_they_where_it_has_nothing_to_say_of_a_row(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path, asked: str
) -> None:
    """Also as a member: nobody says anything of a token of which one says nothing."""
    student = tiny_model(seed=1)
    _saved(tiny_model(seed=2), tmp_path / "big")
    recipe = _recipe(tmp_path, asked=asked)
    examples = [EXAMPLES[0], replace(EXAMPLES[1], label=None), EXAMPLES[2]]  # no label row, and no view of the other
    teachers, rows, batch = _opened(recipe, student, examples)
    known = teachers[asked].signals(batch).of_target(1).known
    assert known is not None
    assert known.tolist() == [row.example != 1 for row in _rationales(rows) for _ in row.label_ids]
    expected = _update(recipe, student, [6], examples=examples)
    assert expected[0] > 1e-3
    for sizes, chunk_tokens in (([1] * 6, 0), ([6], 3), ([2, 4], 2)):
        for found, wanted in zip(_update(recipe, student, sizes, chunk_tokens, examples), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_as_a_member_it_reads_its_own_view_and_the_others_do_not(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    student, big = tiny_model(seed=1), tiny_model(seed=2)
    _saved(big, tmp_path / "big")
    recipe = _recipe(tmp_path, asked="pair")
    teachers, rows, batch = _opened(recipe, student)
    said = teachers["pair"].signals(batch).of_target(1)
    width = len(student.tokenizer)
    told = torch.cat([_by_hand(big, TOLD[row.example], row.label_ids) for row in _rationales(rows)])[:, :width]
    plain = teachers["plain"].signals(batch).of_target(1).logits
    wanted = 0.75 * told.softmax(-1) + 0.25 * plain.softmax(-1)
    torch.testing.assert_close(said.logits.exp(), wanted, atol=1e-6, rtol=1e-4)


def test_a_row_without_a_gold_label_adds_nothing(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Its tokens count all the same: what one row adds does not depend on another's label."""
    student = tiny_model(seed=1)
    _saved(tiny_model(seed=2), tmp_path / "big")
    recipe = _recipe(tmp_path)
    unlabelled = [replace(EXAMPLES[0], label=None), *EXAMPLES[1:]]
    teachers, rows, batch = _opened(recipe, student, unlabelled)
    (facts,) = facts_of_views(recipe, rows).values()
    own = [row for row in _rationales(rows) if row.example == 0]
    assert (facts.num_rows, facts.untold, facts.unmatched) == (4, 2, sum(len(row.label_ids) for row in own))
    assert "says nothing of 2 of 4 rows" in str(facts)
    soft = recipe.objective[1]
    objective = Objective([soft])
    ((student_says, taught),) = StepByStep().compare(student.model, teachers, batch, objective)
    said = student_says.where(student_says.targets == 1)  # type: ignore[union-attr]
    each = soft.of_each(said, taught["big"])  # type: ignore[arg-type]
    known = taught["big"].known
    assert known is not None
    assert known.tolist() == [False] * facts.unmatched + [True] * (facts.num_tokens - facts.unmatched)
    assert (each[~known] == 0).all()
    assert (each[known] > 0).all()
    counts = objective.counts(batch)
    assert counts.tolist() == [facts.num_tokens]
    torch.testing.assert_close(objective(student_says, taught, counts)[0], each.sum() / facts.num_tokens)


def test_the_average_of_the_student_may_be_shown_more(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """It stays one that moves: its state goes through the view."""
    student = tiny_model(seed=1)
    recipe = _recipe(tmp_path, asked="own")
    teachers, rows, batch = _opened(recipe, student)
    own = teachers["own"]
    assert isinstance(own, MovingTeacher)
    assert isinstance(own, LazyTeacher)
    texts = [f"The answer is {example.label}. {example.input}" for example in EXAMPLES]
    wanted = [_by_hand(student, f"explain: {texts[row.example]}", row.label_ids) for row in _rationales(rows)]
    torch.testing.assert_close(own.signals(batch).of_target(1).logits, torch.cat(wanted), atol=1e-5, rtol=1e-4)
    before = {name: weight.clone() for name, weight in own.state().items()}
    with torch.no_grad():
        for weight in student.model.parameters():
            weight.add_(0.1)
    own.after_step(student.model, 1)
    assert all((own.state()[name] != weight).any() for name, weight in before.items())
    own.restore(before)
    torch.testing.assert_close(own.signals(batch).of_target(1).logits, torch.cat(wanted), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keep", [[1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1, 1]])
def test_selected_rows_are_as_if_collated_alone(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path, keep: list[int]
) -> None:
    student = tiny_model(seed=1)
    _saved(tiny_model(seed=2), tmp_path / "big")
    teachers, rows, batch = _opened(_recipe(tmp_path), student)
    got = select_rows(batch, torch.tensor(keep, dtype=torch.bool))
    expected = collator_for(student, teachers)([row for row, kept in zip(rows, keep, strict=True) if kept])
    assert got.keys() == expected.keys()
    places = view_column("big", "places")
    width = expected[places].size(1)
    assert (got[places][:, width:] == -1).all(), "no model reads it: its padding may stay"
    for name, column in expected.items():
        assert got[name][:, :width].tolist() == column.tolist() if name == places else torch.equal(got[name], column)


def test_the_student_is_given_none_of_it(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    student = tiny_model(seed=1)
    _saved(tiny_model(seed=2), tmp_path / "big")
    _, rows, batch = _opened(_recipe(tmp_path), student)
    start = student.model.config.decoder_start_token_id if student.is_encoder_decoder else None
    plain = Collator(student.tokenizer.pad_token_id, start)(rows)
    assert model_inputs(batch).keys() == model_inputs(plain).keys()
    assert {name.split(".")[1] for name in batch if name.startswith("view.")} == {"big"}


# -- tokenizers of its own


def _foreign(folder: Path, align: str) -> Recipe:
    text = YAML.replace("FOLDER", str(folder))
    text = text.replace("loss: {kind: forward_kl}", "loss: {kind: universal_logit}").replace("TEACHER", "other")
    other = f"  other: {{kind: frozen, model: {folder}/other, own_tokenizer: true, align: {align}}}\n"
    (folder / "shown.yaml").write_text(yaml.safe_dump(SHOWN))
    return recipe_from(parse_yaml(text.replace("objective:", f"{other}objective:"), "test"), ())


FAMILIES = [("t5", "llama"), ("llama", "t5"), ("llama", "llama"), ("t5", "t5")]


@pytest.mark.parametrize("align", ["text", "position"])
@pytest.mark.parametrize(("of_student", "of_teacher"), FAMILIES, ids="-".join)
def test_another_tokenizer_and_family(
    request: pytest.FixtureRequest, tmp_path: Path, of_student: str, of_teacher: str, align: str
) -> None:
    """Of the text "ann pays 2 ." and so on, a word is one token of the student's, and one or more of the teacher's."""
    student = request.getfixturevalue(f"tiny_{of_student}")(seed=1)
    other = request.getfixturevalue(f"tiny_{of_teacher}")(seed=2, tokenizer="bytes_bpe", text="ann pays so and " * 3)
    assert len(other.tokenizer) > len(student.tokenizer)
    _saved(other, tmp_path / "other")
    recipe = _foreign(tmp_path, align)
    teachers, rows, batch = _opened(recipe, student)
    said = teachers["other"].signals(batch).of_target(1)
    assert said.known is not None
    assert said.logits.size(1) == len(other.tokenizer)
    token, unmatched = 0, 0
    for row in _rationales(rows):
        example = EXAMPLES[row.example]
        text = student.tokenizer.decode(row.label_ids).removesuffix(" </s>")
        assert text in ANSWERS[example.id].rationales
        ids = other.tokenizer(text, add_special_tokens=False)["input_ids"] + [other.tokenizer.eos_token_id]
        logits = _by_hand(other, f"explain: {example.input}", ids)
        words = text.split() if align == "text" else []
        for number in range(len(row.label_ids)):
            place = number
            if align == "text":  # the bytes before the word, and with it the space that the tokenizer puts in front
                before = other.tokenizer(" ".join(words[:number]), add_special_tokens=False)["input_ids"]
                place = len(before) if number else 0
            if place < len(ids):
                assert said.known[token]
                torch.testing.assert_close(said.logits[token], logits[place], atol=1e-5, rtol=1e-4)
            else:
                unmatched += 1
                assert not said.known[token]
            token += 1
    assert token == len(said.known)
    (facts,) = facts_of_views(recipe, rows).values()
    assert facts.unmatched == unmatched


@pytest.mark.parametrize(("of_student", "of_teacher"), FAMILIES[:2], ids="-".join)
def test_another_tokenizer_in_micro_batches_and_chunks(
    request: pytest.FixtureRequest, tmp_path: Path, of_student: str, of_teacher: str
) -> None:
    student = request.getfixturevalue(f"tiny_{of_student}")(seed=1)
    _saved(request.getfixturevalue(f"tiny_{of_teacher}")(seed=2, tokenizer="bytes_bpe"), tmp_path / "other")
    recipe = _foreign(tmp_path, "text")
    expected = _update(recipe, student, [7])
    assert expected[0] > 1e-3
    for sizes, chunk_tokens in (([1] * 7, 0), ([3, 4], 0), ([7], 3), ([2, 5], 2)):
        for found, wanted in zip(_update(recipe, student, sizes, chunk_tokens), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_training_goes_on_through_a_view_to_the_same_weights(
    tiny_t5: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """Through the trainer: one step of all rows, and the same in micro-batches of one."""
    from transformers import set_seed

    from distill_llm.recipe.train import TrainSpec
    from distill_llm.training.train import fit, make_trainer

    _saved(tiny_t5(seed=2), tmp_path / "big")
    recipe = _recipe(tmp_path)
    weights: list[Any] = []
    for rows_per_batch in (6, 1):
        student = tiny_t5(seed=1)
        set_seed(3)
        trainer = make_trainer(
            student,
            _rows(recipe, student)[:6],
            spec=TrainSpec(max_steps=2, rows_per_step=6, rows_per_batch=rows_per_batch, learning_rate=1e-2),
            max_steps=2,
            scheme=StepByStep(),
            objective=Objective(recipe.objective),
            teachers=open_teachers(recipe, recipe.objective, student),
            validate=None,
            folder=tmp_path / str(rows_per_batch),
            seed=3,
        )
        fit(trainer, tmp_path / str(rows_per_batch))
        weights.append({name: weight.detach() for name, weight in student.model.named_parameters()})
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=1e-3)


def test_what_it_says_of_a_batch_does_not_depend_on_who_is_beside_it(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    student, big = tiny_model(seed=1), tiny_model(seed=2)
    _saved(big, tmp_path / "big")
    teachers, rows, batch = _opened(_recipe(tmp_path), student)
    together = teachers["big"].signals(batch).of_target(1).logits
    collate = collator_for(student, teachers)
    alone = [teachers["big"].signals(collate([row])).logits for row in _rationales(rows)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert signals_of(torch.zeros(*batch["labels"].shape, 2), batch).known is None


def test_a_teacher_with_more_words_makes_the_chunks_smaller(
    tiny_t5: Callable[..., LoadedModel], tiny_llama: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """Or its logits of one chunk would take many times the memory that the student's are kept to."""
    student = tiny_t5(seed=1)
    _saved(tiny_llama(seed=2, tokenizer="bytes_bpe"), tmp_path / "other")
    recipe = _foreign(tmp_path, "text")
    teachers, _, batch = _opened(recipe, student)
    objective, seen = Objective(recipe.objective), []
    head = OutputHead(student.model, chunk_tokens=8)
    ((said, taught),) = StepByStep().compare(student.model, teachers, batch, objective, head)
    counts = objective.counts(batch)
    for chunk_tokens, longest in ((100, 8), (3, 3)):
        heard: Any = {"other": replace(taught["other"], chunk_tokens=chunk_tokens)}  # type: ignore[type-var]
        objective(said, heard, counts, lambda term, student, *_: seen.append((term.name, len(student.token_ids))))
        assert max(length for name, length in seen if name == "soft") == longest
        seen.clear()
