"""Rows: who writes what where, which prefix the student reads, and what is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tokenizers.processors import TemplateProcessing

from distill_llm.core.errors import DataError
from distill_llm.core.example import Example, TeacherAnswer
from distill_llm.data.collate import Collator
from distill_llm.data.rows import RowSet, build_rows, target_texts
from distill_llm.data.view import StudentView
from distill_llm.models.spec import Prefixes
from distill_llm.tasks.shop import Shop

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill_llm.models.load import LoadedModel

TASK = Shop()
EXAMPLES = (
    Example(id="one", input="who pays more ?", prompt="", label="ann"),
    Example(id="two", input="what costs 3 ?", prompt="", label="bob"),
    Example(id="three", input="a b c", prompt="", label=None),
)
ANSWERS = {
    "one": TeacherAnswer("bob", ("ann pays 2 .", "ann pays 1 + 1 ."), 0.5),
    "two": TeacherAnswer("bob", (), 1.0),
}


def _view(model: LoadedModel, **options: Any) -> StudentView:
    defaults: dict[str, Any] = {
        "tokenizer": model.tokenizer,
        "is_encoder_decoder": model.is_encoder_decoder,
        "prefixes": Prefixes(),
        "chat": False,
        "max_input_tokens": 32,
        "max_target_tokens": 16,
    }
    return StudentView(**(defaults | options))


def _rows(model: LoadedModel, **options: Any) -> RowSet:
    defaults: dict[str, Any] = {
        "task": TASK,
        "view": _view(model),
        "targets": ("label", "rationale", "rationale_then_label"),
        "label_from": "gold",
    }
    return build_rows(EXAMPLES, ANSWERS, **(defaults | options))


def test_texts_of_each_target() -> None:
    one, two, three = EXAMPLES

    def texts(example: Example, target: Any, label_from: Any) -> list[str]:
        return target_texts(example, ANSWERS.get(example.id), target, task=TASK, label_from=label_from)

    assert texts(one, "label", "gold") == ["ann"]
    assert texts(one, "label", "teacher") == ["bob"]
    assert texts(one, "rationale", "gold") == ["ann pays 2 .", "ann pays 1 + 1 ."]
    said = TASK.answer_sentence("bob", one)
    assert texts(one, "rationale_then_label", "teacher") == [f"ann pays 2 . {said}", f"ann pays 1 + 1 . {said}"]
    assert texts(two, "rationale", "gold") == []
    assert texts(three, "label", "gold") == []
    assert texts(three, "label", "teacher") == []


def test_votes_stand_in_where_no_gold_label_is_known() -> None:
    one, _, three = EXAMPLES
    voted = TeacherAnswer("ann", ("a b .",), 1.0)

    def texts(example: Example, answer: TeacherAnswer | None, target: Any) -> list[str]:
        return target_texts(example, answer, target, task=TASK, label_from="gold_else_teacher")

    assert texts(one, ANSWERS["one"], "label") == ["ann"], "its gold label, not the vote for bob"
    assert texts(one, None, "label") == ["ann"]
    assert texts(three, voted, "label") == ["ann"]
    assert texts(three, voted, "rationale_then_label") == [f"a b . {TASK.answer_sentence('ann', three)}"]
    assert texts(three, None, "label") == []
    assert texts(three, TeacherAnswer(None, ("a b .",), 0.0), "label") == []


def test_rows_stand_in_example_order_with_prefix_and_end(tiny_t5: Callable[..., LoadedModel]) -> None:
    model = tiny_t5()
    rows = _rows(model, targets=("label", "rationale"))
    read = [
        (row.example, row.target, model.tokenizer.decode(row.input_ids), model.tokenizer.decode(row.label_ids))
        for row in rows.rows
    ]
    assert read == [
        (0, "label", "predict : who pays more ?", "ann </s>"),
        (0, "rationale", "explain : who pays more ?", "ann pays 2 . </s>"),
        (0, "rationale", "explain : who pays more ?", "ann pays 1 + 1 . </s>"),
        (1, "label", "predict : what costs 3 ?", "bob </s>"),
    ]
    assert rows.count() == {"label": 2, "rationale": 2}
    assert (rows.inputs_cut, rows.targets_cut) == (0, 0)
    assert rows.rows[0].num_tokens == 6 + 2


def test_cut_texts_are_counted(tiny_t5: Callable[..., LoadedModel]) -> None:
    model = tiny_t5()
    rows = _rows(model, targets=("rationale",), view=_view(model, max_input_tokens=4, max_target_tokens=5))
    assert (rows.inputs_cut, rows.targets_cut) == (2, 1)
    assert [len(row.label_ids) for row in rows.rows] == [5, 5]
    assert model.tokenizer.decode(rows.rows[0].label_ids) == "ann pays 2 . </s>", "it fits with its end"
    assert model.tokenizer.decode(rows.rows[1].label_ids) == "ann pays 1 + 1", "what was cut does not pretend to end"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("rationale",), "answers": {}}, "none of the 3 training examples has a kept rationale\\. "),
        ({"targets": ("label",), "answers": {}, "label_from": "teacher"}, "has a teacher's label\\. "),
        ({"targets": ("rationale_then_label",), "answers": {}}, "has a kept rationale and a gold label\\. "),
        (
            {"targets": ("rationale_then_label",), "answers": {}, "label_from": "gold_else_teacher"},
            "has a kept rationale and a gold or teacher's label",
        ),
    ],
)
def test_a_target_without_a_row_is_an_error_that_says_what_to_do(
    tiny_t5: Callable[..., LoadedModel], options: dict[str, Any], message: str
) -> None:
    options = {"task": TASK, "view": _view(tiny_t5()), "label_from": "gold"} | options
    answers = options.pop("answers")
    with pytest.raises(DataError, match=message) as caught:
        build_rows(EXAMPLES, answers, **options)
    assert caught.value.exit_code == 2


def test_a_decoders_prompt_ends_with_a_line_and_not_with_an_end_of_sequence(
    tiny_llama: Callable[..., LoadedModel],
) -> None:
    model = tiny_llama(tokenizer="bytes_bpe")
    (ids,), cut = _view(model).inputs(["who pays more ?"], "label")
    assert model.tokenizer.decode(ids).lstrip(" ") == "predict: who pays more ?\n"
    assert model.tokenizer.eos_token_id not in ids
    assert cut == 0


def test_a_tokenizer_that_adds_an_end_itself_gives_one_end(tiny_t5: Callable[..., LoadedModel]) -> None:
    """T5's own tokenizer puts </s> behind every text: inputs of an encoder keep it, targets get no second one."""
    from tokenizers.processors import TemplateProcessing

    model = tiny_t5()
    end = model.tokenizer.eos_token_id
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end)]
    )
    (ids,), _ = _view(model).inputs(["ann"], "label")
    assert model.tokenizer.decode(ids) == "predict : ann </s>"
    (labels,), _ = _view(model).targets(["ann pays"])
    assert model.tokenizer.decode(labels) == "ann pays </s>"
    (long,), cut = _view(model, max_input_tokens=4).inputs(["a b c d e"], "label")
    assert (model.tokenizer.decode(long), cut) == ("predict : a </s>", 1)
    decoder = _view(model, is_encoder_decoder=False)
    (prompt,), _ = decoder.inputs(["ann"], "label")
    assert end not in prompt
    assert decoder.targets(["ann pays"])[0] == [labels]


def test_a_long_prompt_keeps_its_start_and_its_cue(tiny_llama: Callable[..., LoadedModel]) -> None:
    model = tiny_llama()
    ids = list(range(100))
    view = _view(model, max_input_tokens=20)
    assert view._cut_input(ids) == [*range(12), *range(92, 100)]
    (got,), cut = _view(model, max_input_tokens=8).inputs(["a b c d e f g h"], "rationale")
    assert (model.tokenizer.decode(got), cut) == ("explain : a b e f g h", 1)


def test_chat_wraps_the_input_and_leaves_no_room_for_special_tokens(tiny_llama: Callable[..., LoadedModel]) -> None:
    model = tiny_llama(tokenizer="bytes_bpe")
    model.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
    )
    (ids,), _ = _view(model, chat=True).inputs(["who ?"], "rationale")
    assert model.tokenizer.decode(ids).lstrip(" ") == "[user]explain: who ?[me]"


def test_prefixes_must_differ() -> None:
    with pytest.raises(ValueError, match="same prefix"):
        Prefixes(label="predict: ", rationale="predict: ")


def test_no_text_no_row(tiny_t5: Callable[..., LoadedModel]) -> None:
    assert _view(tiny_t5()).inputs([], "label") == ([], 0)
    assert _view(tiny_t5()).targets([]) == ([], 0)


def test_a_prefix_on_the_decoders_side_leaves_one_input_for_all_targets(tiny_t5: Callable[..., LoadedModel]) -> None:
    model = tiny_t5()
    rows = _rows(model, view=_view(model, prefix_side="decoder"), targets=("label", "rationale")).rows
    decode = model.tokenizer.decode
    assert [(decode(row.input_ids), decode(row.prefix_ids), decode(row.label_ids)) for row in rows[:2]] == [
        ("who pays more ?", "predict :", "ann </s>"),
        ("who pays more ?", "explain :", "ann pays 2 . </s>"),
    ]
    assert len({tuple(row.input_ids) for row in rows[:3]}) == 1
    assert rows[0].num_tokens == len(rows[0].input_ids) + 2 + 2
    batch = Collator(0, 0)(rows[:2])
    assert decode(batch["decoder_input_ids"][1]) == "<pad> explain : ann pays 2 ."
    assert batch["labels"][1].tolist() == [-100, -100, *rows[1].label_ids]
    assert _view(model).decoder_prefix("label") == []


def test_what_begins_every_text_stands_before_the_prefix(tiny_t5: Callable[..., LoadedModel]) -> None:
    """BART's `<s>`: the decoder reads it once, where it did in pretraining."""
    model = tiny_t5()
    tokenizer = model.tokenizer
    first, last = tokenizer.convert_tokens_to_ids(["?", "</s>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="? $A </s>", special_tokens=[("?", first), ("</s>", last)]
    )
    view = _view(model, prefix_side="decoder")
    predict, colon, ann = tokenizer.convert_tokens_to_ids(["predict", ":", "ann"])
    assert view.decoder_prefix("label") == [first, predict, colon]
    assert view.targets(["ann"])[0] == [[ann, last]]
    assert _view(model).targets(["ann"])[0] == [[first, ann, last]]
