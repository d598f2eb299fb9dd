"""Labels by likelihood, and the offset of a class that was never seen."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from distill_llm.core.errors import ConfigError, DataError
from distill_llm.core.example import Example
from distill_llm.core.progress import SILENT
from distill_llm.data.view import StudentView
from distill_llm.evaluation.likelihood import best, check_closed, fit_bias, score_labels
from distill_llm.models.spec import Prefixes
from distill_llm.tasks.jsonl import Jsonl

TASK = Jsonl.model_validate({"data": "nowhere.jsonl", "fields": {"input": ["q"]}})
CHOICES = ("ann", "bob so", "a b c")
EXAMPLES = tuple(
    Example(str(n), text, text, label="ann", choices=CHOICES) for n, text in enumerate(("who pays", "a", "b c d e f g"))
)


def _view(made: Any, **changes: Any) -> StudentView:
    settings: dict[str, Any] = {
        "tokenizer": made.tokenizer,
        "is_encoder_decoder": made.is_encoder_decoder,
        "prefixes": Prefixes(),
        "chat": False,
        "max_input_tokens": 64,
        "max_target_tokens": 8,
    }
    return StudentView(**(settings | changes))


@pytest.mark.parametrize("batch_rows", [1, 4, 100])
def test_a_score_is_what_transformers_says_of_the_text(tiny_model: Any, batch_rows: int) -> None:
    """Its loss is the mean over the tokens of the label and the end of the text, one row at a time."""
    made = tiny_model()
    view = _view(made)
    found = score_labels(made.model.train(), view, EXAMPLES, batch_rows=batch_rows, progress=SILENT, name="")
    assert made.model.training
    made.model.eval()
    for example, scores in zip(EXAMPLES, found.scores, strict=True):
        ((ids,), _), (labels, _) = view.inputs([example.input], "label"), view.targets(list(CHOICES))
        for label, own in zip(CHOICES, labels, strict=True):
            if made.is_encoder_decoder:
                batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([own])}
            else:
                batch = {"input_ids": torch.tensor([ids + own]), "labels": torch.tensor([[-100] * len(ids) + own])}
            with torch.no_grad():
                expected = -made.model(**batch).loss * len(own)
            assert scores[label] == pytest.approx(float(expected), abs=1e-4)


def test_a_label_behind_a_picture_is_scored_as_transformers_scores_it(tiny_vision: Any) -> None:
    pytest.importorskip("PIL", reason="needs the extra pictures")
    made = tiny_vision()
    view = _view(made, painter=made.painter, prefix_side="decoder", prefixes=Prefixes(label=""))
    found = score_labels(made.model, view, EXAMPLES, batch_rows=4, progress=SILENT, name="")
    (pictures, _), (labels, _) = view.pictures(EXAMPLES, "label"), view.targets(list(CHOICES))
    assert len({tuple(scores.values()) for scores in found.scores}) == len({one.text for one in pictures})
    for picture, scores in zip(pictures, found.scores, strict=True):
        for label, own in zip(CHOICES, labels, strict=True):
            pixels = made.painter.pixels([picture])
            with torch.no_grad():
                expected = -made.model(pixel_values=pixels, labels=torch.tensor([own])).loss * len(own)
            assert scores[label] == pytest.approx(float(expected), abs=1e-4)


def test_the_likeliest_is_the_answer_and_a_bias_can_change_it(tiny_t5: Any) -> None:
    made = tiny_t5()
    found = score_labels(made.model, _view(made), EXAMPLES, batch_rows=8, progress=SILENT, name="")
    plain = found.predictions(TASK)
    assert [one.label for one in plain.items] == [max(scores, key=scores.__getitem__) for scores in found.scores]
    worst = min(found.scores[0], key=found.scores[0].__getitem__)
    assert found.predictions(TASK, {worst: 1e3}).items[0].label == worst
    assert [one.correct for one in found.predictions(TASK, {"ann": 1e3}).items] == [True] * 3


def test_labels_that_are_the_same_tokens_are_refused(tiny_t5: Any) -> None:
    made = tiny_t5()
    strange = (Example("1", "who", "who", choices=("zebra", "xylophone")),)
    with pytest.raises(ConfigError, match="cannot tell the labels 'zebra' and 'xylophone' apart"):
        score_labels(made.model, _view(made), strange, batch_rows=8, progress=SILENT, name="")


def test_only_closed_sets_of_labels_can_be_chosen_from() -> None:
    check_closed(EXAMPLES, "test", ["ann"])
    with pytest.raises(DataError, match=r"example '1' \(test\) has 0\. Use by: generation"):
        check_closed((Example("1", "a", "a"),), "test")
    with pytest.raises(ConfigError, match=r"evaluate\.label_bias\.eve: no example of the test split has this label"):
        check_closed(EXAMPLES, "test", ["eve"])


def _drawn(seed: int, count: int, lowered: dict[str, float]) -> tuple[list[dict[str, float]], list[str]]:
    """Scores that tell the gold label fairly well, but for offsets of some."""
    chance, names = random.Random(seed), "abcd"
    gold = [chance.choice(names) for _ in range(count)]
    scores = [
        {name: chance.gauss(2.0 if name == label else 0.0, 1.0) - lowered.get(name, 0.0) for name in names}
        for label in gold
    ]
    return scores, gold


def _right(scores: Any, gold: Any, bias: dict[str, float]) -> int:
    return sum(best(one, bias) == label for one, label in zip(scores, gold, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_one_offset_is_the_best_there_is(seed: int) -> None:
    """No offset of a fine grid, and none beside any example's margin, gets more right."""
    scores, gold = _drawn(seed, 60, {"c": 4.0})
    bias = fit_bias(scores, gold, ["c"], {})
    margins = [max(v for k, v in one.items() if k != "c") - one["c"] for one in scores]
    tried = [m + e for m in margins for e in (-1e-9, 1e-9)] + [n / 50 for n in range(-500, 501)]
    assert _right(scores, gold, bias) == max(_right(scores, gold, {"c": offset}) for offset in tried)
    assert bias["c"] == pytest.approx(4.0, abs=1.5)


def test_two_classes_alone_are_lowered_together() -> None:
    """As with Hinton's 7s and 8s: each by itself would only let the other win."""
    scores, gold = _drawn(3, 200, {"a": -9.0, "b": -9.0})
    bias = fit_bias(scores, gold, ["a", "b"], {})
    grid = [n / 4 for n in range(-60, 21)]
    found = max(_right(scores, gold, {"a": a, "b": b}) for a, b in itertools.product(grid, grid[::4]))
    assert _right(scores, gold, bias) >= 0.97 * found
    assert _right(scores, gold, {}) < 0.6 * found
    assert bias["a"] == pytest.approx(-9, abs=1.5)


def test_nothing_is_moved_where_nothing_is_gained() -> None:
    scores, gold = [{"a": 2.0, "b": 0.0}, {"a": 0.0, "b": 1.0}], ["a", "b"]
    assert fit_bias(scores, gold, ["a"], {}) == {"a": 0.0}
    assert fit_bias(scores, ["b", "b"], ["a"], {}) == {"a": -3.0}, "a nat beyond the last margin"
    assert fit_bias(scores, ["b", "b"], ["a"], {"b": 5.0}) == {"a": 0.0}, "beside what is fixed"
