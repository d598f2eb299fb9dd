"""Lines of progress in a log: how far, how fast, how long it still takes; bars have the same."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from distill_llm.cli.progress import TerminalProgress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("distill_llm.cli.progress.time.monotonic", found)
    return found


def _lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_log_has_a_line_now_and_then_with_rate_and_rest(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=50)
    with TerminalProgress(console) as progress:
        for second in range(41):  # 20 a second, after 1,000 that were there before
            clock.now = 1000.0 + second
            progress.advance("rationales", 1000 + 20 * second, 1800, "98% parsed")
    assert _lines(console) == [
        "rationales: 1,000 of 1,800 (98% parsed)",
        "rationales: 1,220 of 1,800 (98% parsed), 20/s, 0:00:29 left",
        "rationales: 1,440 of 1,800 (98% parsed), 20/s, 0:00:18 left",
        "rationales: 1,660 of 1,800 (98% parsed), 20/s, 0:00:07 left",
        "rationales: 1,800 of 1,800 (98% parsed), 20/s",
    ]


def test_a_slow_rate_has_digits_and_work_of_an_instant_none(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=50)
    with TerminalProgress(console) as progress:
        progress.advance("slow", 0, 10)
        clock.now += 4000
        progress.advance("slow", 3, 10)
        progress.advance("quick", 0, 5)
        progress.advance("quick", 5, 5)
    assert _lines(console) == [
        "slow: 0 of 10", "slow: 3 of 10, 0.00075/s, 2:35:33 left", "quick: 0 of 5", "quick: 5 of 5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("width", "ends"),
    [
        (140, "40,046/40,100 2/s 0:00:04 0:00:27 98% parsed, 70% right, 81% agreed"),
        (88, "40,046/40,100 2/s 0:00:27 98% parsed, 70% right, 81% agreed"),
    ],
)
def test_a_bar_has_rate_rest_and_note_in_any_terminal(width: int, ends: str) -> None:
    now = 50.0
    console: Any = Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system=None, get_time=lambda: now
    )
    progress = TerminalProgress(console)
    for done in (40_040, 40_042, 40_044, 40_046):  # those before the first came in no time: they say nothing of a rate
        progress.advance("rationales, train", done, 40_100, "98% parsed, 70% right, 81% agreed")
        now += 1
    console.print(progress._bars.get_renderable())
    said = " ".join(_lines(console)[-1].split())
    assert said.startswith("rationales, train")
    assert said.replace(",", "").endswith(ends.replace(",", ""))
