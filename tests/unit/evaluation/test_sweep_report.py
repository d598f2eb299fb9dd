"""What a sweep says of its settings: choice, lead, advice, tables, picture; against values worked out by hand."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distill_llm.evaluation.scorecard import Facts, Scorecard, build_scorecard
from distill_llm.evaluation.sweep_report import (
    AxisRecord,
    SweepReport,
    Tried,
    advise,
    choose,
    save_report,
    score_test,
    spread,
    to_markdown,
    to_table,
    to_test_table,
)

TEMPERATURE = AxisRecord(keys=("o.soft.loss.temperature",), name="temperature", values=(1, 2, 4), shown=("1", "2", "4"))
TEACHER = AxisRecord(
    keys=("teachers.big.model", "rationales.teacher.model"), name="model", values=("r/a", "r/b"), shown=("a", "b")
)


def _tried(places: tuple[int, ...], *validation: float) -> Tried:
    mean, deviation = spread(validation)
    axes = (TEMPERATURE, TEACHER)[: len(places)]
    overrides = tuple(f"{axis.keys[0]}={axis.values[place]}" for axis, place in zip(axes, places, strict=True))
    return Tried(
        places=places,
        overrides=overrides,
        validation=validation,
        mean=mean,
        deviation=deviation,
        parameters=49_000,
        train_seconds=12.5,
        folders=tuple(f"runs/{places}-{number}" for number in range(len(validation))),
    )


def _card(seed: int, student: int, control: int) -> Scorecard:
    """Ten test examples, of which so many are right."""

    def answers(right: int) -> list[bool]:
        return [number < right for number in range(10)]

    return build_scorecard(
        {
            "student": (Facts(role="student", description="s"), answers(student)),
            "labels same steps": (Facts(role="control", description="c"), answers(control)),
        },
        student="student",
        task="shop",
        metric="text_accuracy",
        hardware="a CPU",
        created=datetime.date(2026, 11, 26),
        versions={"python": "3.11"},
        seed=seed,
        resamples=100,
    )


@pytest.fixture
def report() -> SweepReport:
    tried = (
        _tried((0, 0), 0.50, 0.60),
        _tried((0, 1), 0.55, 0.65),
        _tried((1, 0), 0.80, 0.70),
        _tried((1, 1), 0.60, 0.70),
        _tried((2, 1), 0.10, 0.30),
    )
    cards = [_card(1, 8, 5), _card(2, 6, 7)]
    axes = (TEMPERATURE, TEACHER)
    return SweepReport(
        recipe="tiny",
        metric="text_accuracy",
        axes=axes,
        seeds=(1, 2),
        grid_size=6,
        validation_examples=20,
        test_examples=10,
        tried=tried,
        chosen=2,
        advice=advise(axes, tried, 2),
        test=score_test(cards),
        scorecards=("runs/a/scorecard.md", "runs/b/scorecard.md"),
        verdicts=tuple(card.verdict for card in cards),
        notes=(),
        versions={"python": "3.11"},
        hardware="a CPU",
        created=datetime.date(2026, 11, 26),
    )


def _shown(table: Any) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_spread_is_that_of_a_sample() -> None:
    assert spread([0.5]) == (0.5, None)
    mean, deviation = spread([0.1, 0.2, 0.6])
    assert mean == pytest.approx(0.3)
    assert deviation == pytest.approx(((0.2**2 + 0.1**2 + 0.3**2) / 2) ** 0.5)


def test_best_mean_is_chosen_not_the_best_seed_and_of_equals_the_first() -> None:
    assert choose([[0.5, 0.6], [0.9, 0.1], [0.6, 0.5]]) == 0
    assert choose([[0.1], [0.3], [0.2]]) == 1


def test_advice_names_values_lead_and_edge(report: SweepReport) -> None:
    # mean 75, sd 0.0707; the next is (2, b) with gaps 0.2 and 0.0: mean 10 points, sd 14.1
    assert report.advice == (
        "Take o.soft.loss.temperature=2 teachers.big.model=r/a: 75.0 ± 7.1% on validation over 2 seeds. It is +10.0 ± "
        "14.1 points ahead of the next (model=b), on 1 of 2 seeds."
    )
    alone = (_tried((0,), 0.5), _tried((1,), 0.6), _tried((2,), 0.7))
    said = advise((TEMPERATURE,), alone, 2)
    assert "+10.0 points ahead of the next (temperature=2), on one seed; --seeds 3 would tell" in said
    assert said.endswith("temperature 4 is the largest that was tried: try larger ones too.")
    assert "the smallest that was tried" in advise((TEMPERATURE,), alone[::-1], 2)
    level = (_tried((0,), 0.5, 0.5), _tried((1,), 0.5, 0.5))
    assert advise((TEMPERATURE,), level, 0).endswith(
        "The next (temperature=2) is level with it: this tells nothing apart."
    )


def test_test_scores_are_paired_by_seed(report: SweepReport) -> None:
    student, control = report.test
    assert (student.accuracies, student.difference, student.ahead) == ((0.8, 0.6), None, None)
    assert control.accuracies == (0.5, 0.7)
    assert control.difference == pytest.approx(0.1)  # +0.3 and -0.1
    assert control.difference_deviation == pytest.approx(0.08**0.5)
    assert control.ahead == 1


def test_tables_show_the_best_first(report: SweepReport) -> None:
    lines = _shown(to_table(report)).splitlines()
    assert lines[1].split() == ["temperature", "model", "mean", "±", "sd", "parameters", "train", "s"]
    assert [line.split()[:6] for line in lines[3:5]] == [
        ["best", "2", "a", "75.0", "±", "7.1"],
        ["2", "b", "65.0", "±", "7.1", "49k"],
    ]
    assert len(lines) == 8
    control = _shown(to_test_table(report)).splitlines()[-1].split()
    assert control == ["labels", "same", "steps", "control", "60.0", "±", "14.1", "+10.0", "±", "28.3", "1", "of", "2"]


def test_files_hold_it_all(report: SweepReport, tmp_path: Path) -> None:
    save_report(tmp_path, report, plot="sweep.png")
    assert SweepReport.model_validate(json.loads((tmp_path / "sweep.json").read_text())) == report
    text = (tmp_path / "sweep.md").read_text()
    assert f"**{report.advice}**" in text
    assert "| **best** | 2 | a | 75.0 ± 7.1 | 49k | 12.5 |" in text
    assert "- **model**: `teachers.big.model` and `rationales.teacher.model`, a (`r/a`), b (`r/b`)" in text
    assert "5 of 6 settings, text_accuracy on 20 validation examples, training seeds 1, 2." in text
    assert "](sweep.png)" in text
    assert "sweep.png" not in to_markdown(report)


def test_plot_without_matplotlib_says_how_to_get_it(
    report: SweepReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    from distill_llm.core.errors import ConfigError
    from distill_llm.evaluation.sweep_plot import save_plot

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'distill-llm\[plot\]'"):
        save_plot(tmp_path / "sweep.png", report)


def test_plot_shows_means_deviations_and_the_chosen(report: SweepReport, tmp_path: Path) -> None:
    """What is drawn is read back from the figure, panel by panel."""
    pytest.importorskip("matplotlib")
    from distill_llm.evaluation.sweep_plot import make_figure, save_plot

    temperature, model = make_figure(report).axes
    assert [label.get_text() for label in temperature.get_xticklabels()] == ["1", "2", "4"]
    assert model.get_xlabel() == "teachers.big.model\nrationales.teacher.model"
    assert temperature.get_ylabel() == "validation accuracy, %"
    line = temperature.containers[0]  # as the chosen one in all else: the teacher a
    assert line[0].get_xydata().tolist() == [[0.0, pytest.approx(55)], [1.0, pytest.approx(75)]]
    bars = [segment.tolist() for segment in line[2][0].get_segments()]
    assert bars[1] == [[1.0, pytest.approx(75 - 7.0711, abs=1e-3)], [1.0, pytest.approx(75 + 7.0711, abs=1e-3)]]
    drawn = {
        points.get_label(): points.get_offsets().tolist() for points in temperature.collections if points.get_label()
    }
    assert drawn["chosen"] == [[1.0, 75.0]]
    assert drawn["all other settings"] == [[0.0, pytest.approx(60)], [1.0, pytest.approx(65)], [2.0, pytest.approx(20)]]
    seeds = [line.get_ydata().tolist() for line in temperature.lines if line.get_marker() == "."]
    assert seeds == [[50, pytest.approx(80)], [pytest.approx(60), 70]]
    save_plot(tmp_path / "sweep.png", report)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.png"]
