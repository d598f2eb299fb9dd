"""Teacher and student see different modalities of one example: what each says is what its model says when it is fed by
hand, at the same tokens, however the step is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError
from transformers import set_seed

from distill_llm.core.errors import ConfigError, DataError, Interrupted
from distill_llm.core.example import Example, Splits, TeacherAnswer
from distill_llm.core.signals import Batch, model_inputs, select_rows, signals_of
from distill_llm.data.rows import Row, build_rows
from distill_llm.models.head import OutputHead
from distill_llm.objective import Objective
from distill_llm.pipeline.arms import Sizes, plan_arms
from distill_llm.pipeline.pictures import check_pictures, findings_of_pictures
from distill_llm.pipeline.trial import open_teachers, student_view
from distill_llm.pipeline.views import check_views, make_viewers
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.recipe import Recipe
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.stages import STUDENT
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.base import Sampling
from distill_llm.teachers.transformers import Transformers
from distill_llm.training.train import collator_for, fit, make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from distill_llm.models.load import LoadedModel
    from distill_llm.teachers.base import TensorTeacher

pytest.importorskip("PIL", reason="needs the extra pictures")

YAML = """
name: tiny
task: {kind: jsonl, data: unread.jsonl, fields: {input: question}}
rationales: {teacher: {kind: gold}}
student: {model: a/b}
teachers: {big: {kind: frozen, model: FOLDER/big, view: {template: "{input}"}}}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: rationale, loss: {kind: cross_entropy}, targets: [rationale], weight: 0.5}
  - {name: soft, loss: {kind: forward_kl, temperature: 2.0}, targets: [label, rationale], teacher: big}
train: {max_steps: 2}
"""
SEES = "student={model: a/b, picture: {width: 96, height: 33, font: fixed}, prefix_side: decoder}"
PICTURE_VIEW = "{template: '{input}', picture: {width: 96, height: 33, font: fixed}, prefix_side: decoder}"
EXAMPLES = [
    Example("one", "who pays more ?", "Q: who pays more ?\nA:", label="ann"),
    Example("two", "what costs 1 and what ?", "Q: what ?\nA:", label="b"),
    Example("three", "who ?", "Q: who ?\nA:", label="bob"),
    Example("four", "who costs 3 ?", "Q: who costs 3 ?\nA:", label="c"),
]
ANSWERS = {
    "one": TeacherAnswer("ann", ("ann pays 2 because 1 + 1 = 2 .",), 1.0),
    "two": TeacherAnswer("b", ("a costs 1 .",), 1.0),
    "three": TeacherAnswer("bob", ("bob and then so .",), 1.0),
    "four": TeacherAnswer("c", ("c costs 3 because a + b = 3 .",), 1.0),
}


def _recipe(folder: Path, *overrides: str) -> Recipe:
    return recipe_from(parse_yaml(YAML.replace("FOLDER", str(folder)), "test"), overrides)


def _saved(model: LoadedModel, folder: Path) -> None:
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    if model.painter is not None:
        model.painter.save(str(folder))


def _rows(recipe: Recipe, student: LoadedModel) -> tuple[Row, ...]:
    view = student_view(recipe, student.tokenizer, student.is_encoder_decoder, student.painter)
    return build_rows(
        EXAMPLES,
        ANSWERS,
        task=recipe.task,
        view=view,
        targets=("label", "rationale"),
        label_from="gold",
        viewers=make_viewers(recipe, student, view),
    ).rows


def _opened(recipe: Recipe, student: LoadedModel) -> tuple[dict[str, TensorTeacher], tuple[Row, ...], Batch]:
    teachers = open_teachers(recipe, recipe.objective, student)
    rows = _rows(recipe, student)
    return teachers, rows, collator_for(student, teachers)(rows)


def _prefix(row: Row) -> str:
    return {"label": "predict: ", "rationale": "explain: "}[row.target]


def _text_by_hand(model: LoadedModel, row: Row) -> torch.Tensor:
    """Logits of a row's label tokens, of a model that reads its prefix and its text alone."""
    text, labels = _prefix(row) + EXAMPLES[row.example].input, list(row.label_ids)
    ids = model.tokenizer(text if model.is_encoder_decoder else f"{text}\n")["input_ids"]
    with torch.no_grad():
        if not model.is_encoder_decoder:
            return model.model(input_ids=torch.tensor([ids + labels])).logits[0, len(ids) - 1 : -1]
        start = model.model.config.decoder_start_token_id
        return model.model(
            input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[start, *labels[:-1]]])
        ).logits[0]


def _sight_by_hand(model: LoadedModel, row: Row) -> torch.Tensor:
    """The same of one that sees the text without the prefix, which its decoder reads."""
    assert model.painter is not None
    pixels = model.painter.pixels([model.painter.picture(EXAMPLES[row.example].input)])
    prefix = model.tokenizer(_prefix(row).rstrip(), add_special_tokens=False)["input_ids"]
    read = [model.model.config.decoder_start_token_id, *prefix, *row.label_ids[:-1]]
    with torch.no_grad():
        logits = model.model(pixel_values=pixels, decoder_input_ids=torch.tensor([read]), use_cache=False).logits[0]
    return logits[len(prefix) :]


def _close(said: torch.Tensor, wanted: Sequence[torch.Tensor]) -> None:
    torch.testing.assert_close(said, torch.cat(list(wanted)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_teacher_of_text_beside_a_student_that_sees(
    family: str, tiny_vision: Callable[..., LoadedModel], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A decoder-only teacher too: it has columns of its own, and the tokens of the target are the same."""
    student, big = tiny_vision(seed=1), request.getfixturevalue(f"tiny_{family}")(seed=2)
    _saved(big, tmp_path / "big")
    recipe = _recipe(tmp_path, SEES)
    check_views(recipe, EXAMPLES)
    teachers, rows, batch = _opened(recipe, student)
    assert "input_ids" not in batch
    assert batch["pixel_values"].shape == (8, 1, 33, 96)
    logits = student.model(**model_inputs(batch), use_cache=False).logits
    _close(signals_of(logits, batch).logits, [_sight_by_hand(student, row) for row in rows])
    said = teachers["big"].signals(batch)
    _close(said.logits, [_text_by_hand(big, row) for row in rows])
    assert said.token_ids.tolist() == [token for row in rows for token in row.label_ids]
    part = select_rows(batch, batch["targets"] == 0)
    assert part["labels"].size(1) < batch["labels"].size(1)
    assert part["view.big.labels"].size(1) < batch["view.big.labels"].size(1)
    _close(teachers["big"].signals(part).logits, [_text_by_hand(big, row) for row in rows if row.target == "label"])


def test_a_teacher_that_sees_beside_a_student_of_text(
    tiny_model: Callable[..., LoadedModel], tiny_vision: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """Encoder-decoder and decoder-only; the teacher's prefix stands where it was trained with it."""
    student, big = tiny_model(seed=1), tiny_vision(seed=2, decoder="bert")
    _saved(big, tmp_path / "big")
    recipe = _recipe(tmp_path, f"teachers.big.view={PICTURE_VIEW}")
    check_views(recipe, EXAMPLES)
    teachers, rows, batch = _opened(recipe, student)
    assert batch["view.big.pixel_values"].shape == (8, 1, 33, 96)
    said = teachers["big"].signals(batch)
    _close(said.logits, [_sight_by_hand(big, row) for row in rows])
    assert rows[0].tokens_for("big") == 25 + 2 + len(rows[0].label_ids), "patches, `predict :` and the label"
    sizes = Sizes({STUDENT: 1000}, {"big": 5000})
    (arm, *_) = plan_arms(recipe, rows, sizes)
    assert arm.name == "student"


def test_both_see_the_same_pictures(tiny_vision: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Without a view the teacher gets the student's own columns; layers of the decoder may be compared then."""
    student, big = tiny_vision(seed=1), tiny_vision(seed=2, decoder="trocr")
    _saved(big, tmp_path / "big")
    hint = "objective.soft={name: soft, loss: {kind: hint}, targets: [label], teacher: big}"
    recipe = _recipe(tmp_path, SEES, f"teachers.big={{kind: frozen, model: {tmp_path}/big}}", hint)
    check_views(recipe, EXAMPLES)
    teachers, rows, batch = _opened(recipe, student)
    assert not [name for name in batch if name.startswith("view.")]
    _close(teachers["big"].signals(batch).logits, [_sight_by_hand(big, row) for row in rows])
    objective = Objective(recipe.objective)
    ((said, taught),) = StepByStep().compare(student.model, teachers, batch, objective)
    loss, means = objective(said, taught, objective.counts(batch))
    loss.backward()
    assert float(means["soft"]) > 0
    assert student.model.encoder.embeddings.cls_token.grad is not None


def test_an_average_of_the_student_sees_what_it_sees_or_a_picture_of_its_own(
    tiny_vision: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """At step 0 it is the student; told the answer in its picture, it is not."""
    student = tiny_vision(seed=1)
    plain = _recipe(tmp_path, SEES, "teachers.big={kind: ema}")
    teachers, rows, batch = _opened(plain, student)
    wanted = [_sight_by_hand(student, row) for row in rows]
    _close(teachers["big"].signals(batch).logits, wanted)
    told = PICTURE_VIEW.replace("}, prefix", "}, gold_label: true, hint: '{answer} {question}', prefix")
    teachers, rows, batch = _opened(_recipe(tmp_path, SEES, f"teachers.big={{kind: ema, view: {told}}}"), student)
    assert rows[0].views["big"].picture is not None
    assert rows[0].views["big"].picture.text == "The answer is ann. who pays more ?"
    assert (teachers["big"].signals(batch).logits - torch.cat(wanted)).abs().max() > 1e-5


def test_chunks_of_logits_make_the_same_loss_and_gradients(
    tiny_vision: Callable[..., LoadedModel], tiny_t5: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    _saved(tiny_t5(seed=2), tmp_path / "big")
    recipe, found = _recipe(tmp_path, SEES), []
    for chunk_tokens in (0, 5):
        student = tiny_vision(seed=1, decoder="bert")
        teachers, _, batch = _opened(recipe, student)
        objective = Objective(recipe.objective)
        head = OutputHead(student.model, chunk_tokens=chunk_tokens) if chunk_tokens else None
        ((said, taught),) = StepByStep().compare(student.model, teachers, batch, objective, head)
        loss, _ = objective(said, taught, objective.counts(batch))
        loss.backward()
        found.append((loss.detach(), {name: w.grad for name, w in student.model.named_parameters() if w.requires_grad}))
    (one, gradients), (two, others) = found
    torch.testing.assert_close(one, two)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        torch.testing.assert_close(others[name], gradient, atol=1e-6, rtol=1e-4)


def test_the_update_does_not_depend_on_how_a_step_is_cut(
    tiny_vision: Callable[..., LoadedModel], tiny_t5: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """8 x 1, 4 x 2, 2 x 4 and 1 x 8 rows, and by tokens: pictures count as the states that the encoder makes."""
    _saved(tiny_t5(seed=2), tmp_path / "big")
    recipe = _recipe(tmp_path, SEES)
    after: list[dict[str, torch.Tensor]] = []
    cuts = [{"rows_per_batch": size} for size in (1, 2, 4, 8)] + [{"tokens_per_batch": 80}]
    for number, cut in enumerate(cuts):
        set_seed(17)
        student = tiny_vision(seed=1)
        trainer = make_trainer(
            student,
            _rows(recipe, student),
            spec=TrainSpec.model_validate({"max_steps": 2, "rows_per_step": 8, "learning_rate": 1e-2} | cut),
            max_steps=2,
            scheme=StepByStep(),
            objective=Objective(recipe.objective),
            teachers=open_teachers(recipe, recipe.objective, student),
            validate=None,
            folder=tmp_path / str(number),
            seed=17,
        )
        trainer.train()
        after.append({name: weight.clone() for name, weight in student.model.state_dict().items()})
    assert trainer.args.gradient_accumulation_steps == 4, "two rows of 25 states, the prefix and a target"
    before = tiny_vision(seed=1).model.state_dict()
    assert any((after[0][name] - weight).abs().max() > 1e-3 for name, weight in before.items())
    for other in after[1:]:
        for name, weight in after[0].items():
            torch.testing.assert_close(other[name], weight, atol=2e-5, rtol=0)


def test_keys_of_rows_tell_pictures_apart(tiny_vision: Callable[..., LoadedModel], tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, SEES, "teachers.big={kind: ema}")
    rows = _rows(recipe, tiny_vision())
    assert len({row.key for row in rows}) == len(rows)
    same = Row(9, "label", (), rows[0].label_ids, prefix_ids=rows[0].prefix_ids, picture=rows[0].picture)
    other = Row(9, "label", (), rows[0].label_ids, prefix_ids=rows[0].prefix_ids, picture=rows[2].picture)
    assert same.key == rows[0].key != other.key


def test_a_prefix_on_the_encoders_side_is_drawn(tiny_vision: Callable[..., LoadedModel], tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, SEES.replace("decoder", "encoder"), "teachers.big={kind: ema}")
    first, second, *_ = _rows(recipe, tiny_vision())
    assert first.picture is not None
    assert second.picture is not None
    assert [first.picture.text, second.picture.text] == ["predict: who pays more ?", "explain: who pays more ?"]
    assert not first.prefix_ids
    assert first.num_tokens == 25 + len(first.label_ids)


def test_what_doctor_says_of_pictures(tiny_vision: Callable[..., LoadedModel], tmp_path: Path) -> None:
    student = tiny_vision()
    assert student.painter is not None
    recipe = _recipe(tmp_path, SEES, "teachers.big={kind: ema}")
    rows = list(_rows(recipe, student))
    (_, what), (level, lacking), _ = findings_of_pictures(student.painter, rows)
    assert "drawn on 96 x 33 pixels; the model gets 96 x 33, grey, and makes 25 states of each" in what
    assert (level, lacking) == ("ok", "0 of 4 lack some of their text")
    rows.append(Row(9, "label", (), (1,), picture=student.painter.picture("5 €")))
    (_, _), (level, lacking), (_, longest) = findings_of_pictures(student.painter, rows)
    assert (level, lacking.split(". ")[0]) == (
        "warning",
        "1 of 5 lack some of their text; the font (fixed) has no sign for ['€']",
    )
    assert longest.endswith("what costs 1 and / what ?")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["objective.soft.loss={kind: hint, of: encoder}", "teachers.big={kind: ema}"],
            "objective.soft.loss: it compares an encoder's states at the tokens of the input, and a picture has none",
        ),
        (["objective.soft.loss={kind: hint}"], "compares layers at tokens that both models read"),
        (["scheme={kind: on_policy}"], "student.picture: schemes in which the student writes"),
        (["scheme={kind: mutual}"], "or several learn at once .mutual, self_distill. are for students that read text"),
        (["scheme={kind: self_distill}"], "student.picture: schemes in which the student writes"),
        (["student.load_in=4bit"], "`load_in: 4bit` keeps the weights as they are"),
        (["student.load_in=4bit", "student.lora={}"], "`lora` and `chat` are for students that read text"),
        (["train.packing=always"], "train.packing: always: pictures are all of one size"),
        (["teachers.big={kind: ema, view: {gold_label: true}}"], "reads pictures: add `picture` to the view"),
        (
            ["teachers.big.view={style: chat, picture: {}}"],
            "a chat cannot be drawn: set style: text, or remove `picture`",
        ),
    ],
)
def test_what_cannot_be_is_refused_as_the_recipe_loads(overrides: list[str], complaint: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ValidationError), match=complaint):
        _recipe(tmp_path, SEES, *overrides)


def test_what_the_student_writes_is_not_read_behind_a_picture(tmp_path: Path) -> None:
    view = f"teachers.big.view={PICTURE_VIEW}"
    assert _recipe(tmp_path, view).teachers["big"].own_view()
    with pytest.raises(ConfigError, match=r"teachers.big.view.picture: where the student writes"):
        _recipe(tmp_path, view, "scheme={kind: on_policy}")


def test_a_teacher_of_the_other_modality_needs_a_view(
    tiny_vision: Callable[..., LoadedModel], tiny_t5: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """Before any weights are loaded, with the line that is missing."""
    _saved(tiny_t5(), tmp_path / "big")
    plain = f"teachers.big={{kind: frozen, model: {tmp_path}/big}}"
    with pytest.raises(ConfigError, match=r"the teacher reads text, the student pictures.* view: \{template: "):
        check_views(_recipe(tmp_path, SEES, plain), EXAMPLES)
    with pytest.raises(ConfigError, match=r"its view: the model reads text. Remove `picture` there"):
        check_views(_recipe(tmp_path, SEES, f"teachers.big.view={PICTURE_VIEW}"), EXAMPLES)
    _saved(tiny_vision(), tmp_path / "big")
    with pytest.raises(ConfigError, match="the teacher reads pictures, the student text"):
        check_views(_recipe(tmp_path, plain), EXAMPLES)
    with pytest.raises(ConfigError, match=r"its view: the model reads pictures. Add `picture` there"):
        check_views(_recipe(tmp_path), EXAMPLES)
    long = f"teachers.big.view={PICTURE_VIEW.replace('{input}', 'reason about it : {input} and so on {input}')}"
    with pytest.raises(DataError, match="makes a picture that has no room for its text"):
        check_views(_recipe(tmp_path, long), EXAMPLES)


def test_one_that_sees_writes_no_rationales(tiny_vision: Callable[..., LoadedModel], tmp_path: Path) -> None:
    _saved(tiny_vision(), tmp_path / "big")
    with pytest.raises(ConfigError, match="reads pictures, and a prompt is text"):
        Transformers(model=str(tmp_path / "big")).check(chat=False, sampling=Sampling())


def test_a_teacher_that_sees_other_pictures_is_refused(tiny_vision: Callable[..., LoadedModel], tmp_path: Path) -> None:
    from distill_llm.models.load import build_student
    from distill_llm.models.spec import StudentSpec

    big = tiny_vision(seed=2)
    _saved(big, tmp_path / "big")
    spec = {"config": {"model_type": "vision-encoder-decoder"}, "tokenizer": str(tmp_path / "big")}
    spec["config"] |= {"encoder": {"model_type": "vit", "hidden_size": 16, "num_attention_heads": 4, "patch_size": 11}}
    spec["config"] |= {"decoder": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 4}}
    spec["config"]["encoder"] |= {"num_hidden_layers": 1, "intermediate_size": 16}
    student = build_student(
        StudentSpec.model_validate(spec | {"picture": {"width": 88, "height": 33, "font": "fixed"}}), big.tokenizer
    )
    recipe = _recipe(tmp_path, SEES, f"teachers.big={{kind: frozen, model: {tmp_path}/big}}")
    with pytest.raises(
        ConfigError, match=r"it reads pictures of \(1, 33, 96\) .* and the student those of \(3, 33, 88\)"
    ):
        open_teachers(recipe, recipe.objective, student)


def test_the_data_has_to_bring_the_pictures_that_it_should(tmp_path: Path) -> None:
    brings = SEES.replace("font: fixed", "source: data")
    recipe = _recipe(tmp_path, brings, "teachers.big={kind: ema}")
    with pytest.raises(DataError, match=r"source: data: train example 'one' has no image. .*fields\.picture"):
        check_pictures(recipe, Splits(tuple(EXAMPLES), (), ()))
    (tmp_path / "a.png").write_text("no image")
    bad: Any = Example("bad", "who ?", "who ?", picture=str(tmp_path / "a.png"))
    with pytest.raises(DataError, match=r"test example 'bad': the image .*a\.png' cannot be read"):
        check_pictures(recipe, Splits((), (), (bad,)))


def test_a_resume_goes_on_to_the_bit(tiny_vision: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """With dropout, and though a checkpoint has other names for the encoder's weights than the model. The finished
    folder has what plain transformers needs to make pictures."""
    recipe = _recipe(tmp_path, SEES, "teachers.big={kind: ema}")

    def trainer(student: LoadedModel, folder: Path) -> Any:
        set_seed(17)
        return make_trainer(
            student,
            _rows(recipe, student),
            spec=TrainSpec(max_steps=4, rows_per_step=4, rows_per_batch=2, learning_rate=1e-2, validate_every=2),
            max_steps=4,
            scheme=StepByStep(),
            objective=Objective(recipe.objective),
            teachers=open_teachers(recipe, recipe.objective, student),
            validate=None,
            folder=folder,
            seed=17,
        )

    whole, stopped, resumed = (tiny_vision(seed=5, resid_pdrop=0.2) for _ in range(3))
    fit(trainer(whole, tmp_path / "whole"), tmp_path / "whole")
    steps = iter(range(1, 100))
    with pytest.raises(Interrupted, match="stopped at step 3"):
        fit(trainer(stopped, tmp_path / "parts"), tmp_path / "parts", stop_when=lambda: next(steps) == 3)
    fit(trainer(resumed, tmp_path / "parts"), tmp_path / "parts")
    expected = whole.model.state_dict()
    other = {name: float((weight - expected[name]).abs().max()) for name, weight in resumed.model.state_dict().items()}
    assert not any(other.values()), other
    assert (tmp_path / "parts" / "model" / "preprocessor_config.json").is_file()
