"""A preview counts what asking would come to; it asks nothing and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill_llm.core.errors import BudgetReached, ConfigError
from distill_llm.pipeline.preview import preview_rationales
from distill_llm.pipeline.run import generate_rationales


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and "data" not in path.parts}


def test_it_asks_nothing_and_writes_nothing(teach: Any, even: Any, tmp_path: Path) -> None:
    teacher = teach()
    preview = preview_rationales(even())
    assert teacher.asked == []
    assert _files(tmp_path) == set()
    assert (preview.prompt, preview.example_id) == ("Q: is 0 even ?\nA:", "train-0")


def test_it_counts_with_the_teacher_s_tokenizer_where_there_is_one(teach: Any, even: Any) -> None:
    teach(max_prompt_tokens=50)
    preview = preview_rationales(even("rationales.samples=3"))
    assert preview.exact
    assert preview.tokens_a_request == (6, 6, 6)  # Q: is 0 even ? A:
    assert [(part.split, part.requests, part.tokens_in, part.most_tokens_out) for part in preview.splits] == [
        ("train", 36, 36 * 6, 36 * 20),
        ("test", 12, 12 * 6, 12 * 20),
    ]
    assert preview.most_cost is None


def test_it_guesses_without_one(teach: Any, even: Any) -> None:
    teach()
    preview = preview_rationales(even())
    assert not preview.exact
    lengths = [len(f"Q: is {n} even ?\nA:") for n in range(20)]
    assert preview.tokens_a_request[0] == pytest.approx(min(lengths) / 4, abs=1)
    assert preview.tokens_a_request[2] == pytest.approx(max(lengths) / 4, abs=1)


def test_it_knows_the_cost_where_prices_are_known(teach: Any, even: Any) -> None:
    teach(max_prompt_tokens=50)
    prices = "rationales.prices={input_per_million: 1000, output_per_million: 5000, currency: EUR}"
    preview = preview_rationales(even(prices, "rationales.hint_retry={samples: 2}"))
    assert preview.most_cost == pytest.approx((16 * 6 * 1000 + 16 * 20 * 5000) / 1e6)
    assert preview.most_hint_cost == pytest.approx(12 * 2 * (6 * 1000 + 20 * 5000) / 1e6)
    assert preview.currency == "EUR"


def test_what_is_answered_already_costs_nothing(teach: Any, even: Any) -> None:
    teach(max_prompt_tokens=50)
    with pytest.raises(BudgetReached):
        generate_rationales(even("rationales.budget.max_requests=5"))
    run = even().folder / "rationales"
    with (run / "journal.jsonl").open("ab") as file:
        file.write(b'{"key": "torn')  # another command may be writing right now
    before = {path: path.read_bytes() for path in _files(run)}
    parts = preview_rationales(even()).splits
    assert [(part.requests, part.answered, part.tokens_in) for part in parts] == [(12, 5, 7 * 6), (4, 0, 4 * 6)]
    assert [part.most_tokens_out for part in parts] == [7 * 20, 4 * 20]
    assert {path: path.read_bytes() for path in _files(run)} == before
    assert len((run / "journal.jsonl").read_bytes().split(b"\n")) == 6
    others = preview_rationales(even("rationales.sampling.max_new_tokens=9")).splits
    assert [part.answered for part in others] == [0, 0]


def test_hints_are_counted_at_their_most(teach: Any, even: Any, tmp_path: Path) -> None:
    teach()
    recipe = even("rationales.hint_retry={samples: 2}")
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    rows[0]["label"] = None  # nobody could tell it
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preview = preview_rationales(recipe)
    assert (preview.most_hinted, preview.most_hint_cost) == (11 * 2, None)
    assert preview_rationales(even()).most_hinted == 0


def test_a_chat_is_shown_with_who_speaks(teach: Any, even: Any) -> None:
    teach()
    preview = preview_rationales(even("rationales.prompt={style: chat, system: Be brief.}"))
    assert preview.prompt == "[system]\nBe brief.\n[user]\nis 0 even ?"


def test_a_server_that_is_not_there_yet_is_no_hindrance_and_is_said(even: Any) -> None:
    teacher = "rationales.teacher={kind: openai_compatible, model: tiny, base_url: 'http://127.0.0.1:9/v1'}"
    preview = preview_rationales(even(teacher))
    assert (preview.prompt, preview.splits[0].requests) == ("Q: is 0 even ?\nA:", 12)
    assert "rationales.teacher.base_url: cannot connect to http://127.0.0.1:9/v1" in preview.problem


def test_nothing_is_shown_where_no_teacher_can_be_opened(even: Any, tmp_path: Path) -> None:
    gone = [f"{name}: {{teacher: {{kind: transformers, model: {tmp_path / name}}}}}" for name in ("a", "b")]
    several = f"rationales.teacher={{kind: several, drop_failing: true, of: {{{', '.join(gone)}}}}}"
    with pytest.raises(ConfigError, match="none of the teachers can be had"):
        preview_rationales(even(several))


def test_a_recipe_without_a_teacher_has_nothing_to_preview(even: Any) -> None:
    labels = "objective=[{name: label, loss: {kind: cross_entropy}, targets: [label]}]"
    with pytest.raises(ConfigError, match="there is no teacher to ask"):
        preview_rationales(even("rationales=null", labels))
