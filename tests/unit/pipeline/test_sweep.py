"""A sweep's runs share what the teacher wrote; validation chooses; test is looked at for the chosen one alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import distill_llm
from distill_llm.core.errors import BudgetReached, ConfigError
from distill_llm.core.files import read_json, write_json
from distill_llm.pipeline import sweep as sweeps
from distill_llm.pipeline.run import evaluate, run
from distill_llm.pipeline.run_folder import RunFolder, claim, open_run
from distill_llm.pipeline.sweep_grid import plan_sweep
from distill_llm.pipeline.sweep_progress import AllRuns, OneRun

RATES = "train.learning_rate=[0.001, 0.002, 0.003]"
STEPS = ["train.max_steps=1", "evaluate.controls=[labels_same_steps]", "evaluate.resamples=100"]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts accuracies in the place of trainings: ``train({0.002: 0.7})``, by learning rate; gives what was trained."""

    def put(accuracies: Any) -> list[Any]:
        trained = []

        def train_one(label: str, recipe: Any, progress: Any) -> dict[str, Any]:
            folder = claim(recipe)
            trained.append(recipe)
            accuracy = accuracies(recipe) if callable(accuracies) else accuracies[recipe.train.learning_rate]
            write_json(folder.result("student"), {"validation_accuracy": accuracy, "seconds": 2.0})
            return {}

        monkeypatch.setattr(sweeps, "_train_one", train_one)
        monkeypatch.setattr("distill_llm.models.load.count_parameters", lambda source, revision="", *, where: 1000)
        return trained

    return put


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Recipes that were run to the end, in place of the runs."""
    import datetime

    from distill_llm.evaluation.scorecard import Facts, build_scorecard

    done = []

    def run_whole(recipe: Any, *, progress: Any) -> Any:
        done.append(recipe)
        results = {"student": (Facts(role="student", description="s"), [True, False])}
        about = {"task": "t", "metric": "m", "hardware": "h", "versions": {}, "created": datetime.date(2026, 11, 26)}
        return build_scorecard(results, student="student", seed=1, resamples=100, **about)  # pyright: ignore

    monkeypatch.setattr(sweeps, "run", run_whole)
    return done


def test_teacher_is_asked_once_for_all_runs_and_of_test_nothing(teach: Any, even: Any, train: Any, scored: Any) -> None:
    teacher, trained = teach(), train({0.001: 0.5, 0.002: 0.75, 0.003: 0.75})
    recipe = even()
    report = distill_llm.sweep(recipe, [RATES], seeds=2)
    assert len(teacher.keys) == len(set(teacher.keys)) == 12
    assert {request.example.id.split("-")[0] for request in teacher.asked} == {"train"}
    assert [one.train.learning_rate for one in trained] == [0.001, 0.002, 0.003] * 2
    folders = {os.path.realpath(RunFolder(one.folder).rationale_folder) for one in trained}
    assert len(folders) == 1
    journals = {os.path.realpath(RunFolder(one.folder).journal()) for one in trained}
    assert journals == {os.path.realpath(RunFolder(recipe.folder).journal())}
    assert (report.chosen, report.best.validation) == (1, (0.75, 0.75))  # of equals the first
    assert [(one.train.learning_rate, one.training_seed) for one in scored] == [(0.002, 17), (0.002, 18)]
    assert {one.evaluate.controls for one in scored} == {recipe.evaluate.controls}

    run_folder = generated = RunFolder(recipe.folder)
    distill_llm.generate_rationales(even("evaluate.teacher=false", "train.max_steps=9"))
    assert len(teacher.asked) == 12, "the recipe's own run finds them too"
    assert generated.recipe.exists()
    assert run_folder.sweep.exists()


def test_runs_of_other_rationales_share_the_journal(teach: Any, even: Any, train: Any, scored: Any) -> None:
    """Two samples hold the first one; another temperature of sampling is another question."""
    teacher, _ = teach(), train(lambda recipe: recipe.rationales.samples / 10)
    more = ["rationales.sampling.temperature=0.7", "rationales.samples=[1, 2]"]
    report = distill_llm.sweep(even(), more)
    assert len(teacher.keys) == len(set(teacher.keys)) == 24
    assert report.chosen == 1
    sets = [(Path(one.folders[0]) / "rationales").resolve() for one in report.tried]
    assert len(set(sets)) == 2
    ledger = read_json(RunFolder(even().folder).ledger())
    assert ledger["train"]["completions"] == 24, "one ledger, so that a budget is one for the whole sweep"
    assert all((folder / "ledger.json").is_symlink() for folder in sets)


def test_budget_holds_for_the_sweep_as_a_whole(teach: Any, even: Any, train: Any, scored: Any) -> None:
    teacher, trained = teach(), train({})
    words = ["rationales.sampling.temperature=[0.5, 0.7]", "rationales.budget.max_requests=20"]
    with pytest.raises(BudgetReached, match="20"):
        distill_llm.sweep(even(), words)
    assert len(teacher.asked) == 20
    assert trained == []


def test_resumes_and_takes_further_values_along(teach: Any, even: Any, train: Any, scored: Any, sayings: Any) -> None:
    def fails_at_3(recipe: Any) -> float:
        if recipe.train.learning_rate == 0.003:
            raise ConfigError("the third is broken")
        return recipe.train.learning_rate

    teacher, trained = teach(), train(fails_at_3)
    with pytest.raises(ConfigError, match="the third is broken"):
        distill_llm.sweep(even(), [RATES])
    assert not list((even().folder / "sweep").glob("by-*"))
    trained = train(lambda recipe: recipe.train.learning_rate)
    report = distill_llm.sweep(even(), ["train.learning_rate=[0.0005, 0.001, 0.002, 0.003]"], progress=sayings)
    assert [one.train.learning_rate for one in trained] == [0.0005, 0.003]
    assert "sweep: 2 of 4 runs are there already" in sayings.said
    assert [one.mean for one in report.tried] == [0.0005, 0.001, 0.002, 0.003]
    assert len(teacher.asked) == 12


def test_validation_of_each_setting_is_that_of_all(teach: Any, even: Any, train: Any, tmp_path: Path) -> None:
    teach()
    trained = train({})
    with pytest.raises(ConfigError, match=r"=2 and task\.limits\.validation=3 have other validation examples"):
        distill_llm.sweep(even(), ["task.limits.validation=[2, 3]"])
    unlabelled = even("label_from=teacher", unlabelled=("train", "validation"))
    with pytest.raises(ConfigError, match="take the votes of their teacher, and here the teachers differ"):
        distill_llm.sweep(unlabelled, ["rationales.sampling.max_new_tokens=[20, 30]"])
    with pytest.raises(ConfigError, match="no validation example has a label, so that nothing can choose"):
        distill_llm.sweep(even(unlabelled=("validation",)), [RATES])
    assert trained == []
    assert not (tmp_path / "run").exists()


def test_what_a_run_lacks_is_said_before_the_teacher_is_asked(teach: Any, even: Any, train: Any) -> None:
    teacher, trained = teach(), train({})
    with pytest.raises(ConfigError, match=r"tokenizer=\./gone: student\.tokenizer: there is no folder"):
        distill_llm.sweep(even(), ["student.tokenizer=[{kind: words, vocab_size: 128}, ./gone]"])
    words = ["teachers.big={kind: frozen, model: x}", "teachers.big.model=[./gone, ./away]"]
    with pytest.raises(ConfigError, match=r"model=gone: teachers: frozen '\./gone': there is no folder"):
        distill_llm.sweep(even(), words)
    assert (teacher.asked, trained) == ([], [])


def test_tiny_sweep_is_made_of_ordinary_runs(teach: Any, even: Any) -> None:
    """Trained for a step each: a run can be evaluated by itself, and asks of its own what only scoring needs."""
    teacher = teach()
    report = distill_llm.sweep(even(*STEPS), ["train.learning_rate=[0.001, 0.002]"])
    tests = [request.example.id for request in teacher.asked if request.example.id.startswith("test")]
    assert tests == [f"test-{number}" for number in range(16, 20)], "the chosen run scores its teacher"
    assert [one.name for one in report.test] == ["teacher", "student", "labels same steps"]
    chosen, other = (open_run(report.tried[number].folders[0]) for number in (report.chosen, 1 - report.chosen))
    assert sorted(chosen[0].trained_arms()) == ["labels_same_steps", "student"]
    assert other[0].trained_arms() == ["student"]
    assert not other[0].root.joinpath("predictions").exists()
    card = evaluate(report.best.folders[0])
    assert [entry.accuracy for entry in card.entries] == [one.mean for one in report.test]
    asked = len(teacher.asked)
    assert run(other[1]).entries[1].name == "student"
    assert len(teacher.asked) == asked


def test_caches_are_written_before_any_run_is_trained(
    teach: Any, even: Any, train: Any, scored: Any, tiny_t5: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another: two workers would write into a folder that they share."""
    teach()
    done = train({0.001: 0.5, 0.002: 0.6})
    monkeypatch.setattr(sweeps, "cache_signals", lambda recipe, *, progress: done.append("cached"))
    tiny_t5().model.save_pretrained(tmp_path / "t5")
    words = [
        f"teachers={{big: {{kind: frozen, model: {tmp_path / 't5'}}}, disk: {{kind: cached, of: big}}}}",
        "objective.1={name: soft, loss: {kind: forward_kl}, targets: [label], teacher: disk}",
    ]
    distill_llm.sweep(even(*words), ["train.learning_rate=[0.001, 0.002]"])
    assert done[:2] == ["cached"] * 2
    assert [recipe.train.learning_rate for recipe in done[2:]] == [0.001, 0.002]


def test_sweep_works_in_one_process(even: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="`sweep` works in one process"):
        sweeps.run_sweep(plan_sweep(even().model_dump(mode="json"), [RATES]))


def test_progress_is_one_bar_and_a_line_a_run(sayings: Any) -> None:
    everything = AllRuns(sayings, 5, 2)
    for label in ("a", "b"):
        OneRun(label, everything).advance("student", 3, 8, "validation 1.0%")
    assert sayings.bars["sweep"] == (2, 5)
    everything.advance("a", 1, 1, "validation 2.0%")
    everything.advance("b", 1, 1, "validation 3.0%")
    assert sayings.bars == {"sweep": (4, 5)}
    assert sayings.said == [
        "sweep: 2 of 5 runs are there already",
        "[3/5] a: validation 2.0%",
        "[4/5] b: validation 3.0%",
    ]
