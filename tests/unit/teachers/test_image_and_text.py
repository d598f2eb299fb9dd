"""A teacher that reads a picture within a text beside a student that reads the text alone: what it says is what its
model says when it is fed by hand, wherever the picture stands and however the batch is cut."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from distill_llm.core.errors import ConfigError, DataError
from distill_llm.core.example import Example, TeacherAnswer
from distill_llm.core.signals import select_rows
from distill_llm.data.rows import build_rows
from distill_llm.models.head import OutputHead
from distill_llm.models.load import check_student
from distill_llm.models.spec import StudentSpec
from distill_llm.objective import Objective
from distill_llm.pipeline.trial import open_teachers, student_view
from distill_llm.pipeline.views import check_views, make_viewers
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.base import Sampling
from distill_llm.teachers.transformers import Transformers
from distill_llm.training.train import collator_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distill_llm.core.signals import Batch
    from distill_llm.data.rows import Row
    from distill_llm.models.load import LoadedModel
    from distill_llm.recipe.recipe import Recipe
    from distill_llm.teachers.base import TensorTeacher

Image = pytest.importorskip("PIL.Image", reason="needs the extra pictures")

YAML = """
name: tiny
task: {kind: jsonl, data: unread.jsonl, fields: {input: question, picture: image}}
rationales: {teacher: {kind: gold}}
student: {model: a/b}
teachers: {eye: {kind: frozen, model: FOLDER/eye, view: {template: "{input}", picture: {source: data}}}}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: rationale, loss: {kind: cross_entropy}, targets: [rationale], weight: 0.5}
  - {name: soft, loss: {kind: forward_kl, temperature: 2.0}, targets: [label, rationale], teacher: eye}
train: {max_steps: 2}
"""
QUESTIONS = {"one": "who pays more ?", "two": "what costs 1 and what ?", "three": "who ?"}
PATCHES = 4
"""States that the model makes of a picture."""


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    """Each with a picture of another colour."""
    found = []
    for shade, (name, text) in zip((0, 120, 250), QUESTIONS.items(), strict=True):
        Image.new("RGB", (20, 20), (shade, 10, 200)).save(tmp_path / f"{name}.png")
        one = Example(name, text, f"Q: {text}\nA:", label="ann")
        found.append(replace(one, picture=str(tmp_path / f"{name}.png")))
    return found


@pytest.fixture
def eye(tiny_t5: Callable[..., LoadedModel], save_llava: Callable[..., Any], tmp_path: Path) -> tuple[Any, Any, Any]:
    return save_llava(tmp_path / "eye", tiny_t5().tokenizer)


def _recipe(folder: Path, *overrides: str) -> Recipe:
    return recipe_from(parse_yaml(YAML.replace("FOLDER", str(folder)), "test"), overrides)


def _opened(
    recipe: Recipe, student: LoadedModel, examples: list[Example]
) -> tuple[dict[str, TensorTeacher], tuple[Row, ...], Batch]:
    view = student_view(recipe, student.tokenizer, student.is_encoder_decoder)
    answers = {"one": TeacherAnswer("ann", ("ann pays 2 because 1 + 1 = 2 .",), 1.0)}
    kept = {
        example.id: answers.get(example.id, TeacherAnswer("ann", ("bob and then so .",), 1.0)) for example in examples
    }
    viewers = make_viewers(recipe, student, view)
    targets = ("label", "rationale")
    rows = build_rows(
        examples, kept, task=recipe.task, view=view, targets=targets, label_from="gold", viewers=viewers
    ).rows
    teachers = open_teachers(recipe, recipe.objective, student)
    return teachers, rows, collator_for(student, teachers)(rows)


def _student(eye: tuple[Any, Any, Any], family: Callable[..., LoadedModel]) -> LoadedModel:
    """With the teacher's words, <image> among them."""
    student = family(seed=1)
    student.model.resize_token_embeddings(len(eye[1]))
    return replace(student, tokenizer=eye[1])


def _by_hand(
    eye: tuple[Any, Any, Any], examples: list[Example], row: Row, template: str = "<image>{input}\n"
) -> torch.Tensor:
    """Logits of a row's label tokens, one example at a time, with the tokens of the picture written out."""
    model, tokenizer, processor = eye
    example = examples[row.example]
    pixels = processor([Image.open(str(example.picture)).convert("RGB")], return_tensors="pt")["pixel_values"]
    prefix = {"label": "predict: ", "rationale": "explain: "}[row.target]
    text = template.replace("{input}", prefix + example.input).replace("<image>", "<image>" * PATCHES)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        read = torch.tensor([[*ids, *row.label_ids]])
        return model(input_ids=read, pixel_values=pixels, use_cache=False).logits[0, len(ids) - 1 : -1]


def _close(said: torch.Tensor, wanted: list[torch.Tensor]) -> None:
    torch.testing.assert_close(said, torch.cat(wanted), atol=1e-5, rtol=1e-4)


def test_it_says_what_its_model_says(
    tiny_model: Callable[..., LoadedModel], eye: tuple[Any, Any, Any], examples: list[Example], tmp_path: Path
) -> None:
    """Beside encoder-decoder and decoder-only students, of all rows and of some; the picture decides what it says."""
    student, recipe = _student(eye, tiny_model), _recipe(tmp_path)
    check_views(recipe, examples)
    teachers, rows, batch = _opened(recipe, student, examples)
    assert "pixel_values" not in batch
    assert batch["view.eye.pixel_values"].shape == (6, 3, 16, 16)
    said = teachers["eye"].signals(batch)
    _close(said.logits, [_by_hand(eye, examples, row) for row in rows])
    part = select_rows(batch, batch["targets"] == 0)
    _close(
        teachers["eye"].signals(part).logits, [_by_hand(eye, examples, row) for row in rows if row.target == "label"]
    )
    assert rows[0].tokens_for("eye") == len(rows[0].views["eye"].input_ids) + len(rows[0].label_ids)
    others = [replace(example, picture=examples[0].picture) for example in examples]
    same = [row.key == other.key for row, other in zip(rows, _opened(recipe, student, others)[1], strict=True)]
    assert same == [True, True, False, False, False, False], "a cached signal would be another picture's"


def test_the_picture_stands_where_the_template_names_it(
    tiny_t5: Callable[..., LoadedModel], eye: tuple[Any, Any, Any], examples: list[Example], tmp_path: Path
) -> None:
    recipe = _recipe(tmp_path, "teachers.eye.view.template='who ? <image> {input}'")
    teachers, rows, batch = _opened(recipe, _student(eye, tiny_t5), examples)
    said = teachers["eye"].signals(batch).logits
    _close(said, [_by_hand(eye, examples, row, "who ? <image> {input}\n") for row in rows])
    assert (said - torch.cat([_by_hand(eye, examples, row) for row in rows])).abs().max() > 1e-3


def test_chunks_of_logits_make_the_same_loss(
    tiny_t5: Callable[..., LoadedModel], eye: tuple[Any, Any, Any], examples: list[Example], tmp_path: Path
) -> None:
    """Where a row has nothing to tell the teacher too, whose columns hold a picture all the same."""
    recipe = _recipe(tmp_path, "teachers.eye.view.gold_label=true")
    untold, losses = [*examples[:2], replace(examples[2], label=None)], []
    for chunk_tokens in (0, 3):
        student = _student(eye, tiny_t5)
        teachers, rows, batch = _opened(recipe, student, untold)
        assert [row.target for row in rows if "eye" not in row.views] == ["rationale"]
        objective = Objective(recipe.objective)
        head = OutputHead(student.model, chunk_tokens=chunk_tokens) if chunk_tokens else None
        ((said, taught),) = StepByStep().compare(student.model, teachers, batch, objective, head)
        losses.append(objective(said, taught, objective.counts(batch))[0])
    assert float(losses[0]) > 0
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("teachers.eye.view.picture={source: text}", ["picture.source", "source: data"]),
        ("teachers.eye.view.template='<image> {input} <image>'", ["<image> stands 2 times"]),
    ],
)
def test_what_cannot_be_shown_is_refused(
    override: str, words: list[str], eye: tuple[Any, Any, Any], examples: list[Example], tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, DataError)) as refused:
        check_views(_recipe(tmp_path, override), examples)
    assert all(word in str(refused.value) for word in words), refused.value


def test_other_models_of_its_kind_are_named(eye: tuple[Any, Any, Any], examples: list[Example], tmp_path: Path) -> None:
    config = tmp_path / "eye" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llava"', '"model_type": "vipllava"'))
    with pytest.raises(ConfigError, match=r"not known here \(vipllava; llava is\). Remove `picture`"):
        check_views(_recipe(tmp_path), examples)


def test_it_is_no_student_and_writes_no_rationales(eye: tuple[Any, Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can teach by soft labels"):
        check_student(StudentSpec(model=str(tmp_path / "eye")))
    writer = Transformers(model=str(tmp_path / "eye"))
    with pytest.raises(ConfigError, match="can teach by soft labels"):
        writer.check(chat=False, sampling=Sampling())
