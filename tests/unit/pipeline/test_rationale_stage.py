"""Stage one: what is asked once, again, or never; what is missing; and what the data set is made of."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill_llm.core.errors import BudgetReached, ConfigError, TeacherError
from distill_llm.core.files import read_json
from distill_llm.core.journal import keys_of
from distill_llm.pipeline.rationale_stage import check, read_material
from distill_llm.pipeline.run import generate_rationales
from distill_llm.pipeline.run import run as run_recipe
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.rationales.dataset import RationaleRow, read_rows
from distill_llm.tasks.jsonl import Jsonl
from distill_llm.teachers.base import Completion, Failure, Request, TokenScores


def _rows(run: RunFolder, split: str = "train") -> list[RationaleRow]:
    return list(read_rows(run.rationales(split)))


def _outcomes(run: RunFolder, split: str = "train") -> list[str]:
    return [row.outcome for row in _rows(run, split)]


def _wrong_every_third(request: Request) -> str:
    number = int(request.example.id.rsplit("-", 1)[1])
    odd = bool(number % 2) != (number % 3 == 0)
    return f"{number} is a number . The answer is {'no' if odd else 'yes'}."


def test_all_splits_that_are_wanted_are_asked_once(teach: Any, even: Any, sayings: Any) -> None:
    teacher = teach()
    run = generate_rationales(even(), progress=sayings)
    assert [request.example.id for request in teacher.asked] == [
        *(f"train-{n}" for n in range(12)), *(f"test-{n}" for n in range(16, 20)),
    ]  # fmt: skip
    assert _outcomes(run) == ["kept"] * 12
    assert read_json(run.funnel)["test"]["accuracy"] == 1.0
    assert sayings.bars == {"rationales, train": (12, 12), "rationales, test": (4, 4)}
    assert read_json(run.spent)["total"]["tokens_out"] == 16 * 7


def test_a_finished_stage_asks_nothing_and_needs_no_teacher(teach: Any, even: Any, sayings: Any) -> None:
    teacher = teach()
    run = generate_rationales(even())
    before = {path.name: path.read_bytes() for path in run.rationale_folder.iterdir()}
    generate_rationales(even(), progress=sayings)
    assert (len(teacher.asked), teacher.checked) == (16, 1), "the teacher may be gone by now"
    assert "journal: 16 of 16 completions are there already" in sayings.said
    assert {path.name: path.read_bytes() for path in run.rationale_folder.iterdir()} == before


def test_a_kill_costs_what_was_under_way(teach: Any, even: Any) -> None:
    def killed_at_train_5(request: Request) -> str:
        if request.example.id == "train-5":
            raise KeyboardInterrupt
        return "One . The answer is yes."

    killed = teach(killed_at_train_5)
    with pytest.raises(KeyboardInterrupt):
        generate_rationales(even())
    second = teach()
    generate_rationales(even())
    done = killed.keys[:-1]
    assert len(done) == 5
    assert not set(done) & set(second.keys)
    assert len(done) + len(second.keys) == 16


def test_a_torn_journal_asks_for_the_torn_completion_alone(teach: Any, even: Any) -> None:
    teacher = teach()
    run = generate_rationales(even())
    whole, rows = run.journal().read_bytes(), _rows(run)
    run.journal().write_bytes(whole[:-9])
    generate_rationales(even())
    assert len(teacher.asked) == 17
    assert run.journal().read_bytes() == whole
    assert _rows(run) == rows


def test_another_keep_rule_asks_the_teacher_nothing(teach: Any, even: Any) -> None:
    teacher = teach(_wrong_every_third)
    run = generate_rationales(even())
    journal = run.journal().read_bytes()
    assert _outcomes(run) == ["kept"] * 12
    generate_rationales(even("rationales.keep=[{kind: agrees_with_label}]"))
    assert len(teacher.asked) == 16
    assert run.journal().read_bytes() == journal
    assert _outcomes(run) == ["rule: agrees_with_label", "kept", "kept"] * 4


def test_another_way_to_read_answers_asks_the_teacher_nothing(
    teach: Any, even: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teach()
    run = generate_rationales(even())
    monkeypatch.setattr(Jsonl, "answer_pattern", lambda self: r"is (\d+) twice")
    generate_rationales(even())
    assert len(teacher.asked) == 16
    assert [(row.completion_label, row.rationale) for row in _rows(run)][3] == ("1", "3")


@pytest.mark.parametrize("override", ["rationales.sampling.max_new_tokens=9", "rationales.prompt.template='{prompt} '"])
def test_another_setting_asks_all_anew_and_says_what_is_unused(
    teach: Any, even: Any, sayings: Any, override: str
) -> None:
    teacher = teach()
    generate_rationales(even())
    run = generate_rationales(even(override), progress=sayings)
    assert len(teacher.asked) == len(set(teacher.keys)) == 32
    assert len(keys_of(run.journals())) == 32
    assert sayings.said[1:] == ["journal: 16 completions were made with other settings; they stay there, unused"]
    generate_rationales(even(), progress=sayings)
    assert len(teacher.asked) == 32, "going back costs nothing"


@pytest.mark.parametrize("override", ["rationales.keep=[{kind: dedupe}]", "rationales.samples=2", "seed=5"])
def test_training_refuses_rationales_of_other_settings(teach: Any, even: Any, override: str) -> None:
    teach()
    run = generate_rationales(even())
    splits = check(even())
    assert read_material(even(), splits, run) is not None
    with pytest.raises(ConfigError, match="made with another task, seed or `rationales` section"):
        read_material(even(override), splits, run)


def test_splits_that_are_no_longer_wanted_go(teach: Any, even: Any) -> None:
    teach()
    run = generate_rationales(even())
    assert run.rationales("test").exists()
    generate_rationales(even("evaluate.teacher=false"))
    assert not run.rationales("test").exists()
    assert list(read_json(run.funnel)) == ["train"]


def _fails_on(*numbers: int) -> Any:
    def answer(request: Request) -> str | Failure:
        number = int(request.example.id.rsplit("-", 1)[1])
        return Failure("the server was gone.", retries=2) if number in numbers else "One . The answer is yes."

    return answer


def test_failures_are_said_and_asked_again_by_the_next_run_alone(teach: Any, even: Any) -> None:
    teach(_fails_on(3, 7))
    with pytest.raises(TeacherError, match="2 of 16 requests came to nothing, such as: the server was gone") as caught:
        generate_rationales(even())
    run = RunFolder(even().folder)
    assert not run.rationales("train").exists()
    assert read_material(even(), check(even()), run) is None
    assert read_json(run.spent)["total"]["requests"] == 14 + 2 * 3
    assert "Type the same command to ask again for those alone" in str(caught.value)
    mended = teach()
    generate_rationales(even())
    assert [request.example.id for request in mended.asked] == ["train-3", "train-7"]
    assert (read_json(run.spent)["train"]["failures"], _outcomes(run)) == (2, ["kept"] * 12)


@pytest.mark.parametrize(("failing", "size"), [(1, 12), (29, 96), (7, 96), (12, 12)])
def test_the_share_that_an_error_suggests_is_enough(teach: Any, even: Any, failing: int, size: int) -> None:
    """29 of 100 is a share that floating point would just refuse."""
    teach(_fails_on(*range(failing)))
    sizes = {"train": size, "test": 4}
    with pytest.raises(TeacherError) as caught:
        generate_rationales(even(**sizes))
    override = re.search(r"rationales\.allow_missing=[\d.]+", str(caught.value))
    assert override is not None
    run = generate_rationales(even(override[0].rstrip("."), **sizes))
    assert _outcomes(run).count("not completed") == failing
    assert read_json(run.funnel)["train"]["completed"] == size - failing


def test_fewer_than_are_missing_are_not_enough(teach: Any, even: Any) -> None:
    teach(_fails_on(1, 2))
    with pytest.raises(TeacherError, match="2 of 16"):
        generate_rationales(even("rationales.allow_missing=0.12"))


def test_a_budget_stops_cleanly_and_goes_on_when_it_is_raised(teach: Any, even: Any) -> None:
    first = teach()
    with pytest.raises(BudgetReached, match=r"rationales\.budget\.max_requests: 7: the budget is used up") as caught:
        generate_rationales(even("rationales.budget.max_requests=7"))
    assert caught.value.exit_code == 3
    assert "7 of 16 completions there" in str(caught.value)
    run = RunFolder(even().folder)
    assert read_json(run.spent)["total"]["requests"] == len(first.asked) == 7
    with pytest.raises(BudgetReached):
        generate_rationales(even("rationales.budget.max_requests=7"))
    assert len(first.asked) == 7, "it holds however often the command is typed"
    second = teach()
    generate_rationales(even("rationales.budget.max_requests=16"))
    assert (len(second.asked), set(first.keys) & set(second.keys)) == (9, set())
    spent = read_json(run.spent)
    assert [spent[part]["requests"] for part in ("latest", "total")] == [9, 16]
    assert [spent[part]["tokens_out"] for part in ("latest", "total")] == [9 * 7, 16 * 7]
    generate_rationales(even("rationales.budget.max_requests=16"))
    assert read_json(run.spent) == spent, "nothing was asked since"
    assert _outcomes(run) == ["kept"] * 12


@pytest.mark.parametrize(
    ("overrides", "limit"),
    [
        (["rationales.budget.max_tokens=100"], "max_tokens"),
        (["rationales.budget.max_cost=0.0001", "rationales.prices={output_per_million: 1}"], "max_cost"),
    ],
)
def test_a_budget_is_never_overshot(teach: Any, even: Any, overrides: list[str], limit: str) -> None:
    teach()
    with pytest.raises(BudgetReached, match=limit):
        generate_rationales(even(*overrides))
    total = read_json(RunFolder(even().folder).spent)["total"]
    used = {"max_tokens": total["tokens_in"] + total["tokens_out"], "max_cost": total["tokens_out"]}[limit]
    assert 60 < used <= 100
    assert total["cost"] == (round(total["tokens_out"] / 1e6, 6) if limit == "max_cost" else None)


def test_a_budget_may_be_what_the_data_set_is_limited_by(teach: Any, even: Any) -> None:
    teach()
    run = generate_rationales(even("rationales.budget.max_requests=12", "rationales.allow_missing=0.5"))
    assert _outcomes(run, "test") == ["not completed"] * 4


def test_a_lost_ledger_is_made_anew_from_the_journal(teach: Any, even: Any) -> None:
    teach()
    run = generate_rationales(even())
    before = read_json(run.spent)["total"]
    run.ledger().unlink()
    generate_rationales(even())
    after = read_json(run.spent)["total"]
    assert (after["completions"], after["tokens_in"]) == (16, 16 * 5)
    assert after | {"seconds": 0, "tokens_per_second": 0} == before | {"seconds": 0, "tokens_per_second": 0}
    with pytest.raises(BudgetReached):
        generate_rationales(even("rationales.budget.max_requests=16", "rationales.sampling.max_new_tokens=9"))


@pytest.mark.parametrize("label_from", ["teacher", "gold_else_teacher"])
def test_unlabelled_validation_takes_the_votes(teach: Any, even: Any, label_from: str) -> None:
    teach()
    recipe = even(f"label_from={label_from}", unlabelled=("train", "validation"))
    splits = check(recipe)
    assert [example.label for example in splits.validation] == [None] * 4
    run = generate_rationales(recipe)
    material = read_material(recipe, splits, run)
    assert material is not None
    assert [example.label for example in material.splits.validation] == ["yes", "no"] * 2
    assert [example.id for example in material.splits.validation] == [example.id for example in splits.validation]
    assert material.splits.train == splits.train, "the votes of train are answers, not labels"
    assert material.answers["train-3"].label == "no"
    assert set(material.test_answers) == {f"test-{n}" for n in range(16, 20)}


def test_the_scorecard_says_where_votes_validated(teach: Any, even: Any) -> None:
    teach()
    words = ("evaluate.controls=[]", "label_from=gold_else_teacher")
    card = run_recipe(even(*words, unlabelled=("train", "validation")))
    assert card.notes[1].startswith(
        "Validation was by the teacher's votes on 4 of 4 examples, which have no gold label"
    )
    card = run_recipe(even(*words, run="labelled"))
    assert not any("votes" in note for note in card.notes)


def test_only_validation_without_a_label_is_asked_about(teach: Any, even: Any) -> None:
    teacher = teach()
    generate_rationales(even("label_from=gold_else_teacher"))
    generate_rationales(even("label_from=gold", unlabelled=("validation",), run="other"))
    assert {request.split for request in teacher.asked} == {"train", "test"}


def test_log_probabilities_go_from_the_teacher_to_the_data_set(teach: Any, even: Any, tmp_path: Path) -> None:
    from datasets import load_dataset

    scores = TokenScores((3, 4), (-0.25, -1.5), ((3, 9), (4, 8)), ((-0.25, -2.0), (-1.5, -1.75)))
    teach(lambda request: Completion("One . The answer is yes.", 5, 2, scores=scores))
    run = generate_rationales(even("rationales.sampling.top_logprobs=2"))
    first = [
        {"token": "3", "logprob": -0.25, "top": [{"token": "3", "logprob": -0.25}, {"token": "9", "logprob": -2.0}]},
        {"token": "4", "logprob": -1.5, "top": [{"token": "4", "logprob": -1.5}, {"token": "8", "logprob": -1.75}]},
    ]
    files = str(run.rationales("train"))
    loaded = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["logprobs"][0] == loaded["logprobs"][11] == first
    assert len(_rows(run)) == 12


HINTS = ("rationales.hint_retry={samples: 2, template: '{question} (Hint: {answer})'}", "rationales.samples=2")


def _follows_hints(request: Request) -> str:
    """Says no to all: wrong for the even. A hint helps at once, except for train-0, where only one follows it, and for
    train-2, where none does."""
    answer = "no"
    if request.hinted:
        obeys = {"train-0": request.sample == 1, "train-2": False}.get(request.example.id, True)
        answer = "yes" if obeys else "no"
    return f"Thought {request.sample} . The answer is {answer}."


def test_hints_are_asked_only_where_every_vote_was_wrong(teach: Any, even: Any) -> None:
    teacher = teach(_follows_hints)
    run = generate_rationales(even(*HINTS))
    hinted = [request for request in teacher.asked if request.hinted]
    assert [request.example.id for request in hinted] == [f"train-{n}" for n in range(0, 12, 2) for _ in range(2)]
    assert hinted[0].prompt == "Q: is 0 even ? (Hint: The answer is yes.)\nA:"
    rows = _rows(run)
    kept = {(row.example_id, row.sample) for row in rows if row.hinted and row.outcome == "kept"}
    assert kept == {("train-0", 1), *((f"train-{n}", s) for n in (4, 6, 8, 10) for s in (0, 1))}
    assert {row.outcome for row in rows if row.hinted and row.outcome != "kept"} == {"hint not followed"}
    assert {row.teacher_label for row in rows} == {"no"}, "what a hint brought about is no vote"
    counts = read_json(run.funnel)
    assert (counts["train"]["kept_hinted"], counts["train"]["accuracy"]) == (9, 0.5)
    assert counts["test"]["hinted"] == 0


def test_one_right_vote_is_enough_to_go_without_a_hint(teach: Any, even: Any) -> None:
    teacher = teach(lambda request: f"One . The answer is {('yes', 'no')[request.sample]}.")
    generate_rationales(even(*HINTS))
    assert not any(request.hinted for request in teacher.asked)


def test_hints_are_not_asked_twice_nor_for_what_is_missing(teach: Any, even: Any) -> None:
    def fails_once(request: Request) -> str | Failure:
        lost = (request.example.id, request.sample) == ("train-4", 1) and not request.hinted
        return Failure("lost.") if lost else _follows_hints(request)

    first = teach(fails_once)
    with pytest.raises(TeacherError, match="lost"):
        generate_rationales(even(*HINTS))
    assert "train-4" not in {request.example.id for request in first.asked if request.hinted}
    second = teach(_follows_hints)
    run = generate_rationales(even(*HINTS))
    assert [(request.example.id, request.hinted) for request in second.asked] == [
        ("train-4", False), ("train-4", True), ("train-4", True),
    ]  # fmt: skip
    third = teach(_follows_hints)
    generate_rationales(even(*HINTS))
    assert (third.asked, third.checked) == ([], 0)
    assert sum(row.hinted for row in _rows(run)) == 12


def test_a_budget_that_ends_among_the_hints_is_said(teach: Any, even: Any) -> None:
    first = teach(_follows_hints)
    with pytest.raises(BudgetReached, match=r"max_requests: 27: .* 27 of 36 completions there"):
        generate_rationales(even(*HINTS, "rationales.budget.max_requests=27", "evaluate.teacher=false"))
    second = teach(_follows_hints)
    run = generate_rationales(even(*HINTS, "evaluate.teacher=false"))
    assert (len(first.asked), len(second.asked)) == (27, 9)
    assert sum(row.hinted for row in _rows(run)) == 12


def test_hints_that_come_to_nothing_count_as_missing(teach: Any, even: Any) -> None:
    teach(lambda request: Failure("no hints.") if request.hinted else _follows_hints(request))
    with pytest.raises(TeacherError, match="12 of 44 requests came to nothing, such as: no hints"):
        generate_rationales(even(*HINTS))
    run = generate_rationales(even(*HINTS, "rationales.allow_missing=0.3"))
    assert read_json(run.funnel)["train"]["dropped"] == {"not completed": 12}


def test_plain_answers_stay_when_hints_are_added_or_removed(teach: Any, even: Any, sayings: Any) -> None:
    teacher = teach(_follows_hints)
    generate_rationales(even(HINTS[1]))
    assert len(teacher.asked) == 32
    with_hints = generate_rationales(even(*HINTS))
    assert len(teacher.asked) == 32 + 12
    plain = [row for row in _rows(with_hints) if not row.hinted]
    run = generate_rationales(even(HINTS[1]), progress=sayings)
    assert len(teacher.asked) == 44
    assert [replace(row, key="") for row in _rows(run)] == [replace(row, key="") for row in plain]
