"""The scripts under benchmarks/ run, at sizes at which their numbers mean nothing."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill_llm.core.component import kinds
from distill_llm.evaluation.scorecard import Facts, build_scorecard
from distill_llm.losses.base import Loss
from distill_llm.models.load import build_student, load_tokenizer
from distill_llm.recipe.load import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]
TINY = "{model_type: t5, d_model: 16, d_kv: 4, d_ff: 16, num_layers: 1, num_heads: 4, feed_forward_proj: relu}"
SHOP = (
    "task={kind: shop, train_size: 64, validation_size: 8, test_size: 8}",
    "rationales={teacher: {kind: gold}}",
    f"student.config={TINY}",
    "student.tokenizer={kind: words, vocab_size: 512}",
)


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def _rows(text: str, header: str) -> dict[str, list[str]]:
    """The cells of the Markdown table whose header begins so, by each row's first."""
    lines = text[text.index(f"| {header}") :].split("\n\n", maxsplit=1)[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {row[0]: row[1:] for row in cells}


def test_the_trainer_against_the_papers_way(capsys: pytest.CaptureFixture[str]) -> None:
    """Part (d) is a test in earnest: the same losses from another trainer, batches padded otherwise, two forwards."""
    training = importlib.import_module("training")
    few = ["--rounds", "1", "--steps", "2", "--warmup", "1", "--equal-steps", "12", "--threads", "1"]
    by_tokens = ["--ours", "by tokens", "train.tokens_per_batch=200"]
    training.main([*SHOP, "train.rows_per_step=16", "train.rows_per_batch=4", *few, *by_tokens])
    said = capsys.readouterr().out
    assert set(_rows(said, "(a)")) == {"baseline", "ours", "by tokens"}
    soft = _rows(said, "(b), (c)")
    assert set(soft) == {"online soft labels", "cached soft labels"}
    assert re.fullmatch(r"[\d.]+: (not )?met", soft["online soft labels"][-1])
    equal = _rows(said, "(d)")
    assert set(equal) == {"ours", "by tokens"}
    for _, _, largest in equal.values():
        assert float(largest) < 1e-4


def test_parts_of_each_size_are_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = importlib.import_module("parts")
    few = ["--tokens", "100", "400", "--rounds", "1", "--steps", "2", "--warmup", "1"]
    words = [*SHOP, "train.rows_per_step=16", "train.rows_per_batch=16"]
    monkeypatch.setattr(sys, "argv", ["parts.py", *words, *few])
    parts.main()
    rows = _rows(capsys.readouterr().out, "tokens of a part")
    assert set(rows) == {"100", "400"}
    assert all(float(seconds) > 0 for seconds, *_ in rows.values())


def test_data_that_is_not_there_is_a_reason_to_skip(capsys: pytest.CaptureFixture[str]) -> None:
    training = importlib.import_module("training")
    with pytest.raises(SystemExit, match="skipped: /nowhere/cqa is not there"):
        training.main(["task.data=/nowhere/cqa"])


def test_each_way_of_the_papers_trainer_wants_both_targets_of_an_example() -> None:
    row = importlib.import_module("distill_llm.data.rows").Row
    with pytest.raises(AssertionError, match="a label and a rationale"):
        importlib.import_module("paper_trainer").pairs_of([row(0, "label", [1], [1])])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux's /proc")
def test_memory_of_the_loss_by_each_way() -> None:
    """The ways compute the same losses: of both terms, and of the divergence alone."""
    few = ["--words", "3000", "--tokens", "256", "--repeats", "1", "--divergence", "jensen_shannon"]
    done = subprocess.run(
        [sys.executable, "benchmarks/memory.py", *few],
        check=True,
        capture_output=True,
        text=True,
    )
    rows = _rows(done.stdout, "way")
    assert rows["whole"][-1] == rows["chunks"][-1] != rows["divergence"][-1]
    if importlib.util.find_spec("trl") is None:
        assert "trl: skipped" in done.stderr
        assert "trl" not in rows
    else:
        assert rows["trl"][-1] == rows["divergence"][-1]


FEW = [
    "task.train_size=32",
    "task.validation_size=8",
    "task.test_size=8",
    "train.max_steps=2",
    "train.rows_per_step=8",
    "train.rows_per_batch=8",
]


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """A fresh model in the place of the quickstart's teacher."""
    words = "student.tokenizer={kind: words, vocab_size: 512}"
    recipe = load_recipe("benchmarks/divergences.yaml", [*FEW, words])
    texts = [text for example in recipe.task.load(0).train for text in (example.input, example.label or "")]
    made = build_student(recipe.student, load_tokenizer(recipe.student, ["predict: ", *texts]))
    made.model.save_pretrained(tmp_path / "teacher")
    made.tokenizer.save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_each_loss_trains_a_student(
    tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    divergences = importlib.import_module("divergences")
    places = [f"teachers.big.model={teacher}", f"student.tokenizer={teacher}"]
    how = ["--seeds", "1", "--workers", "1", "--out", str(tmp_path / "out"), "--only", "labels only", "total_variation"]
    with pytest.raises(SystemExit, match="not one of its answers is right"):
        divergences.main([*FEW, *places, *how])
    monkeypatch.setattr(divergences, "ask_teacher", lambda overrides: 0.5)
    divergences.main([*FEW, *places, *how])
    rows = _rows(capsys.readouterr().out, "the student learns from")
    assert set(rows) == {"(the teacher itself)", "labels only", "total_variation"}
    assert re.fullmatch(r"[\d.]+", rows["total_variation"][0])
    assert "| total_variation |" in (tmp_path / "out" / "divergences.md").read_text(encoding="utf-8")


def test_the_losses_of_the_table_are_those_of_the_folder() -> None:
    divergences = importlib.import_module("divergences")
    found = {kind for kind, loss in kinds(Loss, "distill_llm.losses").items() if loss.needs_teacher}
    assert found < set(divergences.ways_of([]))
    assert set(divergences.ways_of(["forward_kl"])) == {"forward_kl"}


def test_a_student_counts_as_trained_from_nine_tenths_of_the_teacher_on() -> None:
    divergences = importlib.import_module("divergences")
    outcomes = [
        divergences.Outcome("good", 1, 0.71, 3.0),
        divergences.Outcome("good", 2, 0.75, 5.0),
        divergences.Outcome("bad", 1, 0.71, 3.0),
        divergences.Outcome("odd", 1, None, 0.0, "it wants layers"),
    ]
    rows = _rows(divergences.table(outcomes, teacher=0.8), "the student learns from")
    assert rows["good"] == ["73.0 ± 2.8", "91%", "yes", "4"]
    assert rows["bad"] == ["71.0", "89%", "no", "3"]
    assert rows["odd"][0] == "left out: it wants layers"


def test_each_scheme_of_the_table_is_a_recipe_and_is_compared_with_direct_distillation(
    tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    schemes = importlib.import_module("schemes")
    for own in schemes.WAYS.values():
        load_recipe(schemes.RECIPE, own)
    gold = ["rationales={teacher: {kind: gold}}", "task.labelled=true", "label_from=gold"]
    places = [f"teachers.big.model={teacher}", f"student.tokenizer={teacher}", *gold]
    way = "hints first"
    how = ["--seeds", "1", "--workers", "1", "--out", str(tmp_path / "out"), "--only", way]
    schemes.main([*FEW, *places, *how])
    rows = _rows(capsys.readouterr().out, "scheme")
    assert set(rows) == {schemes.DIRECT, way}
    assert rows[way][2] == "1", "of the steps of a plain training, shared by its two stages"
    assert (tmp_path / "out" / "schemes.json").is_file()


def test_the_interval_of_a_scheme_is_that_of_paired_differences() -> None:
    schemes = importlib.import_module("schemes")
    scores = {schemes.DIRECT: (0.70, 0.60, 0.80), "chain": (0.75, 0.66, 0.83), "refused": ()}
    outcomes = [
        schemes.Outcome(way, seed, {"student": score, "middle": 0.5}, 3.0, 9.0)
        for way, own in scores.items()
        for seed, score in enumerate(own)
    ]
    outcomes.append(schemes.Outcome("refused", 0, None, 0.0, 0.0, "no peers"))
    rows = _rows(schemes.table(outcomes), "scheme")
    # Differences of 5, 6 and 3 points: mean 4.67, deviation 1.53, t(0.975, 2) = 4.303.
    assert rows["chain"] == ["74.7 ± 8.5", "+4.7 [+0.9, +8.5]", "3", "9"]
    assert rows[schemes.DIRECT][1] == ""
    assert rows["refused"][0] == "left out: no peers"


ORIGINALS = (
    "wide, temperature 1",
    "narrow, temperature 1",
    "without fair",
    "low and high only",
    "direct",
    "chain, dense",
)


def test_the_papers_experiments_are_told_beside_theirs_and_resume(
    tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    originals = importlib.import_module("originals")
    monkeypatch.setattr(originals, "run_all", _in_this_process)  # each process would load torch anew
    few = [*FEW, "task.products=20", "train.validate_every=2"]
    how = ["--seeds", "1", "--workers", "1", "--out", str(tmp_path / "out")]
    bill = [*few, *how, "--only", *ORIGINALS, "--parts", "temperature", "left_out", "two_classes", "chain"]
    originals.main(bill)
    said = capsys.readouterr().out
    rows = _rows(said, "temperature")
    assert set(rows) == {"1"}
    assert all(re.fullmatch(r"[\d.]+", cell) for cell in rows["1"]), "one width beside the other"
    rows = _rows(said, "student learns from")
    assert rows["soft labels, without `fair`"][-1].startswith("206")
    assert len(_rows(said, "recall %")) == 5
    assert set(_rows(said, "one layer learns from")) == {"teacher, asked for the label alone", "direct", "chain, dense"}
    assert set(_rows(said, "assistant")) == {"chain, dense: three", "chain, dense: two"}

    with monkeypatch.context() as patch:
        patch.setattr(originals, "run_all", lambda *_: pytest.fail("it was trained already"))
        originals.main(bill)
    again = capsys.readouterr().out
    assert _rows(again, "temperature") == _rows(said, "temperature")
    assert (tmp_path / "out" / "chain.md").read_text(encoding="utf-8").split("\n\n", maxsplit=1)[0] in said

    gold = ["rationales={teacher: {kind: gold}}", "task.labelled=true", "label_from=gold"]
    places = [f"teachers.big.model={teacher}", f"student.tokenizer={teacher}", *gold]
    originals.main([*FEW, *places, *how, "--parts", "eight_times", "--only", "1,000 steps"])
    rows = _rows(capsys.readouterr().out, "student |")
    assert re.search(r", [\d.]+ x$", rows["1,000 steps"][4])


def _in_this_process(
    work: Callable[[Any], Any], jobs: Sequence[Any], workers: int, say: Callable[[Any], None]
) -> list[Any]:
    done = []
    for job in jobs:
        done.append(work(job))
        say(done[-1])
    return done


def _found(answers: dict[str, dict[str, list[list[bool]]]], asked: float = 0.9) -> Any:
    """Of each way, for each model, the answers of each seed."""
    entries: list[dict[str, Any]] = [
        {"way": f"teacher: {name}", "seed": 0, "card": _card({"student": [True] * 4}), "asked": asked}
        for name in ("bill", "deep", "shop")
    ]
    for way, models in answers.items():
        for seed in range(len(next(iter(models.values())))):
            card = _card({name: right[seed] for name, right in models.items()})
            entries.append({"way": way, "seed": seed, "card": card, "steps": 1.0})
    return importlib.import_module("originals_tables").Found(entries)


def _card(answers: dict[str, list[bool]]) -> dict[str, Any]:
    size = {"teacher": 1600, "student": 200}
    facts = {
        name: Facts(role="teacher" if name == "teacher" else "student", description=name, bytes=size.get(name))
        for name in answers
    }
    labels = (["fair", "low"] * len(answers["student"]))[: len(answers["student"])]
    return build_scorecard(
        {name: (facts[name], right) for name, right in answers.items()},
        student="student",
        task="bill",
        metric="text_accuracy",
        hardware="none",
        created=datetime.date(2026, 1, 1),
        versions={},
        seed=0,
        notes=["student: label_bias in nats: fair +2.00 (fitted on 4 validation examples)."],
        labels=labels,
        left_out=["fair"],
    ).model_dump(mode="json")


def test_the_papers_tables_pair_seeds() -> None:
    tables = importlib.import_module("originals_tables")
    right = {"1": 2, "2.5": 4, "4": 2, "8": 3, "20": 1}
    found = _found({f"wide, temperature {t}": {"student": [_right(n, 4)] * 2} for t, n in right.items()})
    rows = _rows(tables.temperature(found), "temperature")
    assert rows["2.5"] == ["100.0 ± 0.0"]
    assert rows["2.5 and 4, minus 1"][0].startswith("+25.0")
    assert rows["2.5 and 4, minus 8 and 20"][0].startswith("+25.0")

    own = {"student": [_right(3, 4)], "student without bias": [_right(2, 4)], "labels same steps": [_right(1, 4)]}
    said = tables.left_out(_found({"without fair": own}))
    rows = _rows(said, "student learns from")
    assert rows["soft labels, without `fair`"][:2] == ["50.0", "50.0"]
    assert rows["soft labels, without `fair`, bias fitted"][:2] == ["25.0", "100.0"]
    assert "Accuracy, points, paired: the bias +25.0; soft minus hard labels, both with their bias +50.0." in said
    assert "Offsets: fair +2.00; theirs +3.5." in said


def test_a_student_is_near_its_teacher_from_three_tenths_of_a_point_on() -> None:
    tables = importlib.import_module("originals_tables")
    ways = {
        f"{wrong} wrong, 500 steps": {"teacher": [[True] * 1000], "student": [_right(1000 - wrong, 1000)]}
        for wrong in (3, 4)
    }
    rows = _rows(tables.eight_times(_found(ways)), "student |")
    assert [row[-1] for row in rows.values()] == ["yes", "no"]
    assert rows["3 wrong, 500 steps"][4] == "200 B, 8.0 x"


def _right(number: int, of: int) -> list[bool]:
    return [place < number for place in range(of)]


def test_what_quantization_costs_is_paired_by_seed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, teacher: str
) -> None:
    """Run in small, and with numbers of which the differences are known."""
    compress = importlib.import_module("compress")
    for part in compress.PARTS.values():
        load_recipe(compress.RECIPES / f"{part.recipe}.yaml", part.overrides)
    places = [f"teachers.big.model={teacher}", f"student.tokenizer={teacher}", "rationales={teacher: {kind: gold}}"]
    small = [*places, "label_from=gold", "task.labelled=true", "train.max_steps=4", "train.validate_every=2"]
    small += ["task.train_size=32", "task.validation_size=8", "task.test_size=8"]
    compress.main([*small, "--parts", "int4", "--seeds", "1", "--workers", "1", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert {"student", "quantized afterwards", "full precision"} <= set(_rows(said, "model"))
    assert "student - longer quantized afterwards" in _rows(said, "difference")
    models = [{"student": 0.80, "quantized afterwards": 0.70, "full precision": 0.82}]
    models.append({"student": 0.82, "quantized afterwards": 0.76, "full precision": 0.80})
    facts = {"bytes": 100, "parameters": 10, "examples_per_second": 5.0}
    told = compress.tables(
        [
            compress.Outcome("int4", seed, {name: {"accuracy": share, **facts} for name, share in one.items()}, 9.0)
            for seed, one in enumerate(models)
        ]
    )
    rows = _rows(told, "difference")
    assert rows["student - quantized afterwards"][0].startswith("+8.0 [")
    assert rows["student - full precision"] == ["+0.0 [-25.4, +25.4]", "1 of 2"]
    assert _rows(told, "model")["student"][0] == "81.0 ± 1.4"
