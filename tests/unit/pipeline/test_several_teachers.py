"""Several teachers of text: who is asked, who votes with what weight, and what becomes of one that fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from distill_llm.core.errors import BudgetReached, ConfigError, DataError, TeacherError
from distill_llm.core.files import read_json
from distill_llm.core.journal import keys_of
from distill_llm.core.progress import SILENT
from distill_llm.pipeline.asking import Asking, hear_of_dropped
from distill_llm.pipeline.preview import preview_rationales
from distill_llm.pipeline.rationale_stage import check, make_asker, read_material, wanted_splits
from distill_llm.pipeline.run import generate_rationales
from distill_llm.pipeline.run_folder import RunFolder, claim
from distill_llm.rationales.dataset import RationaleRow, read_rows
from distill_llm.recipe.recipe import Recipe

Says = Callable[[int], str]
SPLITS = {"train": range(12), "validation": range(12, 16), "test": range(16, 20)}
COLD = "sampling: {temperature: 0.7}"


def right(number: int) -> str:
    return "no" if number % 2 else "yes"


def wrong(number: int) -> str:
    return "yes" if number % 2 else "no"


@pytest.fixture
def team(tmp_path: Path, even: Any) -> Callable[..., Recipe]:
    """A recipe of replayed teachers: ``team({"a": right, "b": wrong}, "rationales.keep=[]", more={"a": "weight: 2"})``.

    Each writes "NAME thinks . The answer is LABEL."; ``of`` names only some, ``extra`` stands beside them.
    """

    def build(
        says: Mapping[str, Says],
        *overrides: str,
        more: Mapping[str, str] | None = None,
        extra: str = "",
        texts: int = 1,
        **settings: Any,
    ) -> Recipe:
        members = []
        for name, says_of in says.items():
            rows = [
                {
                    "id": f"{split}-{n}",
                    "split": split,
                    "text": [f"{name} thinks {i} . The answer is {says_of(n)}." for i in range(texts)],
                    "tokens_in": [3] * texts,
                    "tokens_out": [5] * texts,
                }
                for split, numbers in SPLITS.items()
                for n in numbers
            ]
            file = tmp_path / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            own = f", {more[name]}" if more and name in more else ""
            replay = f"{{kind: replay, name: {name}, data: {file}, id_field: id, split_field: split}}"
            members.append(f"{name}: {{teacher: {replay}{own}}}")
        whole = f"rationales.teacher={{kind: several{extra}, of: {{{', '.join(members)}}}}}"
        return even(whole, *overrides, **settings)

    return build


def _rows(run: RunFolder, split: str = "train") -> list[RationaleRow]:
    return list(read_rows(run.rationales(split)))


def test_all_write_of_every_example_and_rows_say_who(team: Any, sayings: Any) -> None:
    run = generate_rationales(team({"a": right, "b": wrong}), progress=sayings)
    rows = _rows(run)
    assert [(row.example_id, row.teacher, row.sample) for row in rows[:4]] == [
        ("train-0", "a", 0), ("train-0", "b", 0), ("train-1", "a", 0), ("train-1", "b", 0),
    ]  # fmt: skip
    assert {row.rationale for row in rows if row.teacher == "b"} == {"b thinks 0 ."}
    assert {row.teacher_label for row in rows if row.example_id == "train-3"} == {"no"}, "the earlier wins a tie"
    assert len(rows) == 24
    assert sayings.bars["rationales, b, train"] == (12, 12)
    counts = read_json(run.funnel)
    assert [counts["train"]["teachers"][name]["accuracy"] for name in "ab"] == [1.0, 0.0]
    assert counts["test"]["teachers"]["b"]["completed"] == 4
    material = read_material(team({"a": right, "b": wrong}), check(team({"a": right, "b": wrong})), run)
    assert material is not None
    assert material.answers["train-3"].rationales == ("a thinks 0 .", "b thinks 0 .")
    assert material.answers["train-3"].agreement == 0.5


def test_one_more_teacher_asks_the_others_nothing(team: Any, even: Any, tmp_path: Path) -> None:
    """Its keys are those that it would have alone: a run of one teacher grows to one of several."""
    team({"a": right})
    alone = even(
        f"rationales.teacher={{kind: replay, name: a, data: {tmp_path}/a.jsonl, id_field: id, split_field: split}}"
    )
    first = generate_rationales(alone)
    before = keys_of(first.journals())
    assert len(before) == 16
    for names in ("ab", "abc", "ca"):
        run = generate_rationales(team({name: right if name == "a" else wrong for name in names}))
        now = keys_of(run.journals())
        assert before <= now
        assert len(now) == 16 * (2 if names == "ab" else 3)
        before = now
    entries = [json.loads(line) for line in run.journal().read_text().splitlines()]
    assert [entry.get("teacher", "") for entry in entries] == [""] * 16 + ["b"] * 16 + ["c"] * 16


def test_a_teacher_has_its_say_however_many_samples_it_writes(team: Any) -> None:
    more = {"a": f"samples: 3, {COLD}", "b": f"weight: 2, {COLD}"}
    run = generate_rationales(team({"a": right, "b": wrong}, more=more, texts=3))
    rows = _rows(run)
    assert [row.teacher for row in rows[:4]] == ["a", "a", "a", "b"]
    assert {row.teacher_label for row in rows} == {"yes", "no"}
    assert {(wrong(int(row.example_id.split("-")[1])) == row.teacher_label, row.agreement) for row in rows} == {
        (True, 2 / 3)
    }
    shares = read_json(run.funnel)["train"]["teachers"]
    assert (shares["a"]["asked"], shares["a"]["say"], shares["b"]["say"]) == (36, 1.0, 2.0)


def test_say_by_accuracy_is_measured_on_validation_where_train_has_no_labels(team: Any) -> None:
    """One that is right outvotes two that are wrong; of test labels nothing is used."""
    says = {"a": wrong, "b": wrong, "c": right}
    recipe = team(says, "label_from=teacher", extra=", weigh_by: accuracy", unlabelled=("train",))
    run = generate_rationales(recipe)
    counts = read_json(run.funnel)
    assert counts["validation"]["teachers"]["c"]["known"] == 4
    # 4 of 4 right: p = 5/6, log(5) for two choices; 0 of 4: below chance, nothing
    assert counts["train"]["teachers"]["c"]["say"] == pytest.approx(1.6094379124341003)
    assert counts["train"]["teachers"]["a"]["say"] == 0.0
    assert {row.teacher_label == right(int(row.example_id.split("-")[1])) for row in _rows(run)} == {True}
    assert counts["test"]["accuracy"] == 1.0
    fixed = generate_rationales(team(says, "label_from=teacher", unlabelled=("train",), run="fixed"))
    assert read_json(fixed.funnel)["test"]["accuracy"] == 0.0


def test_say_by_accuracy_needs_labels(team: Any) -> None:
    recipe = team(
        {"a": right, "b": wrong}, "label_from=teacher", extra=", weigh_by: accuracy", unlabelled=("train", "validation")
    )
    with pytest.raises(ConfigError, match=r"rationales\.teacher\.weigh_by: .*there are none.*weigh_by: fixed"):
        generate_rationales(recipe)


def test_one_that_repeats_gold_labels_writes_but_has_no_vote(team: Any, even: Any, tmp_path: Path) -> None:
    team({"a": wrong})
    replay = f"{{kind: replay, name: a, data: {tmp_path}/a.jsonl, id_field: id, split_field: split}}"
    both = (
        f"rationales.teacher={{kind: several, of: {{people: {{teacher: {{kind: gold}}}}, a: {{teacher: {replay}}}}}}}"
    )
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    recipe = even(both, "task.fields.rationale=why")
    (tmp_path / "data" / "train.jsonl").write_text(
        "".join(json.dumps(row | {"why": "People think ."}) + "\n" for row in rows)
    )
    run = generate_rationales(recipe)
    assert {(row.teacher_label == wrong(int(row.example_id.split("-")[1])), row.agreement) for row in _rows(run)} == {
        (True, 1.0)
    }
    assert {row.teacher for row in _rows(run, "test")} == {"a"}
    assert read_json(run.funnel)["test"]["accuracy"] == 0.0


def test_a_teacher_that_cannot_be_had_is_refused_or_dropped(team: Any, tmp_path: Path, sayings: Any) -> None:
    gone = ", drop_failing: true"
    recipe = team({"a": right, "b": wrong})
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"rationales\.teacher\.of\.b: .*b\.jsonl"):
        generate_rationales(recipe)
    assert not RunFolder(recipe.folder).rationales("train").exists()
    mild = team({"a": right, "b": wrong}, extra=gone)
    (tmp_path / "b.jsonl").unlink()
    assert list(preview_rationales(mild).failing) == ["b"]
    run = generate_rationales(mild, progress=sayings)
    assert {row.teacher for row in _rows(run)} == {"a"}
    (said,) = [line for line in sayings.said if "dropped" in line]
    assert "warning: the teacher 'b' is dropped (rationales.teacher.drop_failing): " in said
    shares = read_json(run.funnel)["train"]["teachers"]
    assert (shares["a"]["dropped"], shares["b"]["asked"]) == ("", 0)
    assert "b.jsonl" in shares["b"]["dropped"]
    assert "`b` was dropped: " in run.rationale_card.read_text()


def test_a_dropped_teacher_is_tried_again_until_a_student_has_learned(team: Any, tmp_path: Path) -> None:
    mild = team({"a": right, "b": wrong}, extra=", drop_failing: true")
    there = (tmp_path / "b.jsonl").read_text()
    (tmp_path / "b.jsonl").unlink()
    run = generate_rationales(mild)
    arm = run.models / "student"
    arm.mkdir(parents=True)
    (tmp_path / "b.jsonl").write_text(there)
    generate_rationales(mild)
    assert {row.teacher for row in _rows(run)} == {"a"}, "a student has learned without it"
    arm.rmdir()
    generate_rationales(mild)
    assert {row.teacher for row in _rows(run)} == {"a", "b"}
    assert run.all_dropped() == []


@pytest.mark.parametrize("drops", [True, False])
def test_a_teacher_that_gives_up_on_the_way(team: Any, tmp_path: Path, sayings: Any, drops: bool) -> None:
    """What it wrote before counts; the file ends before the test split begins."""
    recipe = team({"a": right, "b": wrong}, extra=", drop_failing: true" if drops else "")
    lines = (tmp_path / "b.jsonl").read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join(lines[:12]) + "\n")
    if not drops:
        with pytest.raises(TeacherError, match="no completions are there to replay for the test split"):
            generate_rationales(recipe, progress=sayings)
        assert len(keys_of(RunFolder(recipe.folder).journals())) == 28, "what was written is kept"
        return
    run = generate_rationales(recipe, progress=sayings)
    counts = read_json(run.funnel)
    assert counts["train"]["teachers"]["b"]["completed"] == 12
    assert (counts["test"]["asked"], counts["test"]["completed"]) == (4, 4)
    assert {row.teacher for row in _rows(run, "test")} == {"a"}
    assert sum("is dropped" in line for line in sayings.said) == 1


def test_all_may_not_fail(team: Any, tmp_path: Path) -> None:
    recipe = team({"a": right, "b": wrong}, extra=", drop_failing: true")
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(ConfigError, match="none of the teachers can be had"):
        generate_rationales(recipe)


def test_what_is_wrong_in_a_recipe_is_never_dropped(team: Any, even: Any) -> None:
    recipe = team({"a": right, "b": wrong}, extra=", drop_failing: true", more={"b": "prompt: {exemplars: no-such}"})
    with pytest.raises(ConfigError, match=r"rationales\.teacher\.of\.b\.prompt\.exemplars 'no-such': no such file"):
        generate_rationales(recipe)


def test_exemplars_of_any_teacher_may_not_be_test_questions(team: Any, tmp_path: Path) -> None:
    shown = [{"question": "is 17 even ?", "rationale": "No .", "answer": "The answer is no."}]
    (tmp_path / "shown.yaml").write_text(json.dumps(shown))
    recipe = team({"a": right, "b": wrong}, more={"b": f"prompt: {{exemplars: {tmp_path}/shown.yaml}}"})
    with pytest.raises(DataError, match=r"rationales\.teacher\.of\.b\.prompt.*also in the test split"):
        generate_rationales(recipe)


def test_one_budget_for_all_teachers_and_it_resumes(team: Any) -> None:
    says = {"a": right, "b": wrong}
    with pytest.raises(BudgetReached, match="20 of 32 completions"):
        generate_rationales(team(says, "rationales.budget.max_requests=20"))
    run = generate_rationales(team(says, "rationales.budget.max_requests=40"))
    spent = read_json(run.spent)
    assert spent["total"]["requests"] == 32
    assert [spent["teachers"][name]["completions"] for name in "ab"] == [16, 16]
    assert (spent["train"]["completions"], spent["test"]["completions"]) == (24, 8)


def test_each_teacher_has_its_price(team: Any) -> None:
    more = {"a": "prices: {output_per_million: 100}", "b": "prices: {output_per_million: 1}"}
    run = generate_rationales(team({"a": right, "b": wrong}, more=more))
    spent = read_json(run.spent)
    assert spent["teachers"]["a"]["cost"] == pytest.approx(16 * 5 * 100e-6)
    assert spent["total"]["cost"] == pytest.approx(16 * 5 * 101e-6)
    assert preview_rationales(team({"a": right, "b": wrong}, more=more, run="new")).most_cost == pytest.approx(
        16 * 20 * 101e-6
    )
    # a writes 5 tokens for 0.0005, may write 20 for 0.002, and has to stop behind train; b, for nearly nothing, has not
    with pytest.raises(BudgetReached, match=r"max_cost"):
        generate_rationales(team({"a": right, "b": wrong}, "rationales.budget.max_cost=0.0075", more=more, run="poor"))
    journal = RunFolder(team({"a": right}, run="poor").folder).journal().read_text().splitlines()
    asked = [json.loads(line)["teacher"] for line in journal]
    assert (asked.count("a"), asked.count("b")) == (12, 16)


def test_hints_come_where_everybody_is_wrong(team: Any, tmp_path: Path) -> None:
    says = {"a": lambda n: right(n) if n < 4 else wrong(n), "b": lambda n: right(n) if n < 6 else wrong(n)}
    recipe = team(says, "rationales.hint_retry={}", "rationales.allow_missing=0.5")
    for name in "ab":
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            for n in range(12):
                row = {
                    "id": f"train-{n}",
                    "split": "train",
                    "text": f"Told . The answer is {right(n)}.",
                    "hinted": True,
                }
                file.write(json.dumps(row) + "\n")
    rows = [row for row in _rows(generate_rationales(recipe)) if row.hinted]
    assert [(row.example_id, row.teacher) for row in rows] == [
        (f"train-{n}", name) for n in range(6, 12) for name in "ab"
    ]
    assert {row.outcome for row in rows} == {"kept"}


def test_processes_together_make_the_data_set_of_one(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    says = {"a": right, "b": wrong}
    whole = generate_rationales(team(says, run="whole"))
    recipe = team(says, run="shared")
    for rank in (1, 0):
        with monkeypatch.context() as patched:
            patched.setenv("RANK", str(rank))
            patched.setenv("WORLD_SIZE", "2")
            with _asking(recipe) as asking:
                for split, examples in wanted_splits(recipe, check(recipe)).items():
                    asking.complete(split, examples)
    run = generate_rationales(recipe)
    assert [read_json(path)["train/b"]["completions"] for path in run.ledgers()] == [6, 6]
    for split in ("train", "test"):
        assert _rows(run, split) == _rows(whole, split)


def test_the_main_process_hears_whom_another_dropped(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = team({"a": right, "b": wrong}, extra=", drop_failing: true")
    with monkeypatch.context() as patched:
        patched.setenv("RANK", "1")
        patched.setenv("WORLD_SIZE", "2")
        with _asking(recipe) as asking:
            monkeypatch.setattr(asking.asker.speakers[1], "check", _raise_no_server)
            asking.complete("train", check(recipe).train)
    with _asking(recipe) as asking:
        hear_of_dropped(asking.asker, RunFolder(recipe.folder))
        assert [speaker.dropped for speaker in asking.asker.speakers] == ["", "no server"]
        assert asking.count({"train": check(recipe).train}) == (12, 6), "nobody waits for it"


def _raise_no_server() -> None:
    raise ConfigError("no server")


def _asking(recipe: Recipe) -> Asking:
    assert recipe.rationales is not None
    return Asking(make_asker(recipe, recipe.rationales), claim(recipe), SILENT)
