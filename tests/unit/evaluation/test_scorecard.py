from __future__ import annotations

import datetime
import json
import re

import pytest
from rich.console import Console

from distill_llm.core.errors import ConfigError, DataError, StorageError
from distill_llm.evaluation.scorecard import (
    ONE_RUN_NOTE,
    Facts,
    build_scorecard,
    installed_versions,
    load_scorecard,
    save_scorecard,
    to_comparison_table,
    to_markdown,
    to_table,
)

TEACHER = Facts(role="teacher", description="t5-base, replayed", parameters=223_000_000, bytes=892_000_000)
STUDENT = Facts(
    role="student",
    description="label + rationale",
    parameters=1_180_000,
    bytes=4_720_000,
    train_seconds=1182.4,
    train_steps=2000,
    train_tokens=1_300_000,
    learning_rate=1e-3,
    validation_accuracy=0.715,
    examples_per_second=851.2,
)
CONTROL = STUDENT.model_copy(update={"role": "control", "description": "labels only, same steps"})


def answers(right: int, total: int = 500) -> list[bool]:
    return [True] * right + [False] * (total - right)


def card_of(student="distilled", **results):
    return build_scorecard(
        {name.replace("_", " "): result for name, result in results.items()},
        student=student,
        task="shop",
        metric="number_accuracy",
        hardware="2 CPU cores",
        created=datetime.date(2025, 1, 31),
        versions={"python": "3.11.7", "torch": "2.6.0"},
        seed=0,
        notes=["The teacher's answers were replayed."],
    )


@pytest.fixture
def card():
    return card_of(
        labels_only=(CONTROL, answers(310)),
        distilled=(STUDENT, answers(360)),
        shuffled_rationales=(CONTROL, answers(290)),
        big_teacher=(TEACHER, answers(450)),
    )


def is_one_sentence(text: str) -> bool:
    return text.endswith(".") and not re.search(r"[.!?]\s", text)


def test_facts_and_scores_come_together(card):
    assert [entry.name for entry in card.entries] == ["big teacher", "distilled", "labels only", "shuffled rationales"]
    assert [entry.accuracy for entry in card.entries] == [0.9, 0.72, 0.62, 0.58]
    assert all(entry.low < entry.accuracy < entry.high for entry in card.entries)
    assert card.entries[1].train_tokens == 1_300_000
    assert [(c.other, round(c.difference, 6)) for c in card.comparisons] == [
        ("big teacher", -0.18),
        ("labels only", 0.1),
        ("shuffled rationales", 0.14),
    ]
    assert card.comparisons[1].mcnemar_p == pytest.approx(2 * 0.5**50)
    assert card.teacher_retention == pytest.approx(0.8)
    assert card.size_ratio == pytest.approx(223 / 1.18)
    assert card.notes[0] == "The teacher's answers were replayed."
    assert card.notes[-1] == ONE_RUN_NOTE


def test_worth_it_names_the_strongest_control(card):
    assert is_one_sentence(card.verdict)
    assert card.verdict.startswith("Distilling was worth it: 'distilled' answers 72.0% of 500 test examples correctly")
    assert re.search(
        r"\+10\.0 \[\+\d\.\d, \+1\d\.\d\] points against the control 'labels only', the strongest of 2;", card.verdict
    )
    assert card.verdict.endswith("80.0% of the accuracy of the teacher 'big teacher', which is 189 times as large.")


def test_not_shown_when_one_interval_includes_zero():
    card = card_of(
        distilled=(STUDENT, answers(360)), labels_only=(CONTROL, answers(358)), untrained=(CONTROL, answers(0))
    )
    assert is_one_sentence(card.verdict)
    assert card.verdict.startswith("It is not shown that distilling was worth it: ")
    assert "+0.4 [-" in card.verdict
    assert "'labels only', an interval that includes 0." in card.verdict


def test_equal_answers_show_nothing():
    card = card_of(distilled=(STUDENT, answers(500)), labels_only=(CONTROL, answers(500)))
    assert card.verdict.startswith("It is not shown")
    assert card.comparisons[0].mcnemar_p == 1.0


def test_not_worth_it_when_a_control_is_better_even_if_others_are_not():
    card = card_of(
        distilled=(STUDENT, answers(300)),
        labels_only=(CONTROL, answers(350)),
        same=(CONTROL, answers(301)),
        untrained=(CONTROL, answers(0)),
    )
    assert is_one_sentence(card.verdict)
    assert card.verdict.startswith("Distilling was not worth it: ")
    assert re.search(r"-10\.0 \[-1\d\.\d, -\d\.\d\] points against the control 'labels only'\.", card.verdict)


def test_without_a_control_worth_is_not_judged():
    card = card_of(distilled=(STUDENT, answers(360)), big_teacher=(TEACHER, answers(450)))
    assert is_one_sentence(card.verdict)
    assert card.verdict.startswith("Whether distilling was worth it cannot be judged: ")
    assert "nothing was compared" in card.verdict
    assert "80.0% of the accuracy" in card.verdict


def test_other_students_and_the_teacher_do_not_decide():
    small = STUDENT.model_copy(update={"description": "half the size"})
    card = card_of(distilled=(STUDENT, answers(360)), half=(small, answers(400)), labels_only=(CONTROL, answers(300)))
    assert card.verdict.startswith("Distilling was worth it: ")
    assert [comparison.reading for comparison in card.comparisons] == ["worse", "better"]
    assert "the strongest of" not in card.verdict


def test_what_is_unknown_is_left_out():
    unknown = Facts(role="teacher", description="an API")
    card = card_of(distilled=(STUDENT, answers(360)), api=(unknown, answers(400)))
    assert card.size_ratio is None
    assert card.verdict.endswith("90.0% of the accuracy of the teacher 'api'.")
    alone = card_of(distilled=(STUDENT, answers(360)))
    assert (alone.teacher_retention, alone.size_ratio, alone.comparisons) == (None, None, ())
    useless = card_of(distilled=(STUDENT, answers(360)), api=(TEACHER, answers(0)))
    assert useless.teacher_retention is None
    assert is_one_sentence(useless.verdict)


def test_answers_that_cannot_be_aligned_are_refused():
    with pytest.raises(DataError, match="'labels only' has 499 answers and 'distilled' has 500"):
        card_of(distilled=(STUDENT, answers(360)), labels_only=(CONTROL, answers(300, 499)))
    with pytest.raises(ConfigError, match=r"'other' is not one of the students scored: \['distilled'\]"):
        card_of(student="other", distilled=(STUDENT, answers(360)))
    with pytest.raises(DataError, match="no examples"):
        card_of(distilled=(STUDENT, []))


def rendered(table, width: int) -> list[str]:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_cuts_no_number(width):
    slow = CONTROL.model_copy(update={"train_seconds": 123_456.0, "examples_per_second": 12_345.0, "parameters": None})
    card = card_of(
        distilled=(STUDENT, answers(360)),
        a_control_with_quite_a_long_name=(slow, answers(300)),
        perfect=(TEACHER, answers(500)),
    )
    lines = rendered(to_table(card), width)
    assert max(map(len, lines)) <= width
    rows = {line.split()[0]: re.split(r"\s{2,}", line.strip()) for line in lines if "[" in line}
    assert rows["distilled"][2:] == ["72.0 [68.0, 75.8]", "1.2M", "4.7 MB", "1,182", "851"]
    assert rows["perfect"][2:] == ["100.0 [99.2, 100.0]", "223M", "892 MB", "-", "-"]
    assert rows["a"][3:] == ["-", "4.7 MB", "123,456", "12,345"]
    assert "…" not in "\n".join(lines)

    lines = rendered(to_comparison_table(card), width)
    assert max(map(len, lines)) <= width
    assert any(re.search(r"perfect +-28\.0 \[-32\.\d, -24\.\d\] +<0\.001 +worse", line) for line in lines)


def test_names_are_printed_as_they_are():
    card = card_of(student="[bold]a|b", **{"[bold]a|b": (STUDENT, answers(360))})
    assert any("[bold]a|b" in line for line in rendered(to_table(card), 100))
    assert "| **[bold]a\\|b** | student |" in to_markdown(card)


def test_markdown_holds_what_the_card_knows(card):
    text = to_markdown(card)
    assert f"**{card.verdict}**" in text
    assert "| **distilled** | student | 72.0 [68.0, 75.8] | 1.2M | 4.7 MB | 1,182 | 851 |" in text
    assert "- labels only: labels only, same steps; 2,000 steps; 1.3M tokens; learning rate 0.001; 71.5% on" in text
    assert ONE_RUN_NOTE in text
    assert "2025-01-31" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in tables] == [8] * 6 + [5] * 5


def test_a_saved_scorecard_is_read_back_the_same(card, tmp_path):
    path = save_scorecard(tmp_path / "run", card)
    assert load_scorecard(path) == card
    assert load_scorecard(path.parent) == card
    assert (path.parent / "scorecard.md").read_text(encoding="utf-8") == to_markdown(card)
    assert json.loads(path.read_text(encoding="utf-8"))["created"] == "2025-01-31"
    assert sorted(file.name for file in path.parent.iterdir()) == ["scorecard.json", "scorecard.md"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:100], "cannot be read"),
        (lambda text: text.replace('"verdict"', '"judgement"'), "verdict: Field required"),
        (lambda text: text.replace('"accuracy": 0.72', '"accuracy": 72'), r"entries\.1\.accuracy"),
        (lambda text: "[]", "not a scorecard: the file"),
    ],
)
def test_a_damaged_scorecard_is_refused(card, tmp_path, damage, message):
    path = save_scorecard(tmp_path, card)
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(StorageError, match=message):
        load_scorecard(path)


def test_a_missing_scorecard_is_refused(tmp_path):
    with pytest.raises(StorageError, match="cannot be read"):
        load_scorecard(tmp_path)


def test_versions_are_found_without_an_import():
    assert set(installed_versions()) == {"python", "torch", "transformers", "distill_llm"}
