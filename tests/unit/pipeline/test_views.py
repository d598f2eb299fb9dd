"""What a teacher with a view of its own reads, and views that are refused before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from distill_llm.core.errors import ConfigError, DataError
from distill_llm.core.example import Example
from distill_llm.pipeline.rationale_stage import check, load_examples
from distill_llm.pipeline.views import is_asked, render, repeaters, view_prompters
from distill_llm.teachers.base import Message

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill_llm.models.load import LoadedModel
    from distill_llm.recipe.recipe import Recipe

SOFT = "objective.rationale={name: soft, loss: {kind: forward_kl}, targets: [rationale], teacher: big}"
EXAMPLE = Example("one", "is 7 {prompt} even ?", "Q: is 7 {prompt} even ?\nA:", label="no", rationale="7 is {odd} .")


@pytest.fixture
def recipe(even: Any, tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> Callable[..., Recipe]:
    """The recipe ``even`` with a teacher ``big`` whose view has these keys: ``recipe("overlap", gold_label=True)``."""
    model = tiny_t5(text="is even ? " + " ".join(map(str, range(20))))
    model.model.save_pretrained(tmp_path / "big")
    model.tokenizer.save_pretrained(tmp_path / "big")

    def build(*overrides: str, unlabelled: tuple[str, ...] = (), big: str = "big", **view: Any) -> Recipe:
        teacher = {"kind": "frozen", "model": str(tmp_path / big), "view": view}
        return even(
            f"teachers={yaml.safe_dump({'big': teacher}, default_flow_style=True)}",
            SOFT,
            *overrides,
            unlabelled=unlabelled,
        )

    return build


def _shown(folder: Path, *questions: str) -> str:
    rows = [{"question": question, "rationale": "r .", "answer": "The answer is yes."} for question in questions]
    (folder / "shown.yaml").write_text(yaml.safe_dump(rows))
    return str(folder / "shown.yaml")


def _read(recipe: Recipe, target: Any = "rationale") -> Any:
    view = recipe.teachers["big"].own_view()
    assert view is not None
    return render(recipe, view, view_prompters(recipe)["big"], EXAMPLE, target)


def test_what_is_read(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Nothing that stands in a question is taken for a place of the template."""
    plain, told = "is 7 {prompt} even ?", "is 7 {prompt} even ?\n(Hint: The answer is no.)"
    shown = _shown(tmp_path, "is 98 even ?", "is 99 even ?")
    first = "Q: is 98 even ?\nA: r . The answer is yes.\n\n"
    second = first.replace("98", "99")
    assert _read(recipe()) == f"Q: {plain}\nA:"
    assert _read(recipe(gold_label=True)) == f"Q: {told}\nA:"
    assert _read(recipe(exemplars=shown)) == f"{first}{second}Q: {plain}\nA:"
    assert _read(recipe(exemplars=shown, num_exemplars=1, gold_label=True)) == f"{first}Q: {told}\nA:"
    assert _read(recipe(template="{input}")) == f"explain: {plain}"
    assert _read(recipe(template="{input}"), "label") == f"predict: {plain}"
    assert _read(recipe(template="{input}", gold_label=True)) == f"explain: {told}"
    assert _read(recipe(template="so: {prompt} {input}")) == f"so: Q: {plain}\nA: explain: {plain}"
    why = f"{plain}\n(Hint: 7 is {{odd}} .)"
    assert _read(recipe(template="{input}", rationale=True)) == f"explain: {why}"
    assert _read(recipe(rationale=True, gold_label=True)) == f"Q: {plain}\n(Hint: 7 is {{odd}} . The answer is no.)\nA:"
    hint = "The answer is no. It was asked: " + plain
    worded = recipe(gold_label=True, hint="{answer} It was asked: {question}")
    assert _read(worded) == f"Q: {hint}\nA:"


def test_as_a_chat(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    shown = _shown(tmp_path, "is 98 even ?")
    chat = recipe(style="chat", system="be brief", exemplars=shown, gold_label=True)
    assert _read(chat) == (
        Message("system", "be brief"),
        Message("user", "is 98 even ?"),
        Message("assistant", "r . The answer is yes."),
        Message("user", "is 7 {prompt} even ?\n(Hint: The answer is no.)"),
    )


def test_a_sound_view_passes(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    assert len(check(recipe(exemplars=_shown(tmp_path, "is 98 even ?"), gold_label=True)).train) == 12


@pytest.mark.parametrize(
    ("view", "error", "said"),
    [
        ({"exemplars": "gone.yaml"}, ConfigError, r"teachers\.big\.view\.exemplars 'gone\.yaml': no such file"),
        ({"max_input_tokens": 3}, DataError, r"teachers\.big\.view: example 'train-\d+' makes a prompt of \d+ tokens"),
        ({"style": "chat"}, ConfigError, r"teachers\.big\.view\.style: chat: the teacher's tokenizer has no chat"),
    ],
    ids=["exemplars", "long", "chat"],
)
def test_a_view_that_cannot_be_had_is_refused_before_anything_is_loaded(
    recipe: Callable[..., Recipe],
    view: dict[str, Any],
    error: type[Exception],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distill_llm.models.load.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(error, match=said):
        check(recipe(**view))


def test_a_prompt_beyond_the_teachers_context_is_refused(
    recipe: Callable[..., Recipe], tiny_llama: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    small = tiny_llama(text="is even ?", max_position_embeddings=6)
    small.model.save_pretrained(tmp_path / "small")
    small.tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(DataError, match=r"a prompt of 8 tokens and a target of 0, but the teacher takes 6\."):
        check(recipe(big="small"))


def test_a_hint_without_any_gold_label_is_refused(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(DataError, match=r"teachers\.big\.view\.gold_label: no training example has a gold label"):
        check(recipe(gold_label=True, unlabelled=("train",)))
    check(recipe(unlabelled=("train",)))


def test_exemplars_from_the_data_are_refused_or_left_out(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    shown = _shown(tmp_path, "is 3 even ?")
    with pytest.raises(DataError, match=r"teachers\.big\.view\.exemplars .* 1 of .* in the train split"):
        load_examples(recipe(exemplars=shown))
    splits = load_examples(recipe("task.overlap=drop", exemplars=shown))
    assert "train-3" not in [example.id for example in splits.train]
    with pytest.raises(DataError, match="in the test split"):
        load_examples(recipe("task.overlap=drop", exemplars=_shown(tmp_path, "is 17 even ?")))


def test_a_teacher_that_nobody_asks_is_not_read_for(recipe: Callable[..., Recipe]) -> None:
    idle = recipe(
        "objective.soft={name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}", max_input_tokens=3
    )
    assert not is_asked(idle, "big")
    check(idle)


def test_who_is_told_what_it_is_asked(recipe: Callable[..., Recipe]) -> None:
    both = "objective.soft.targets=[label, rationale]"
    assert repeaters(recipe(gold_label=True)) == []
    assert repeaters(recipe(both, gold_label=True)) == [("big", "label")]
    assert repeaters(recipe(both)) == []
