"""What the command line shows of stage one: preview, funnel, ledger, and a budget that is used up."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distill_llm.cli.main import main
from distill_llm.cli.rationales import show_funnel, show_ledger, show_preview
from distill_llm.pipeline.preview import Preview, SplitPreview
from distill_llm.rationales.dataset import Funnel
from distill_llm.rationales.ledger import Prices, Spent, ledger_report
from distill_llm.teachers.base import Completion, Request
from distill_llm.teachers.gold import GoldTeacher

PREVIEW = Preview(
    prompt="Q: [bold]one[/bold] ?\nA:",
    example_id="train-0",
    tokens_a_request=(900, 1_000, 1_100),
    exact=True,
    splits=(SplitPreview("train", 3_000, 1_000, 2_000_000, 512_000), SplitPreview("test", 500, 0, 500_000, 128_000)),
    most_hinted=4_000,
    most_cost=12.345,
    currency="EUR",
)


def _shown(show: Any, value: Any) -> list[str]:
    """The lines, without the width of columns."""
    console = Console(file=io.StringIO(), width=140)
    show(value, console)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def _but(preview: Preview, **changes: Any) -> Preview:
    from dataclasses import replace

    return replace(preview, **changes)


def test_a_preview_shows_prompt_requests_and_cost() -> None:
    lines = _shown(show_preview, PREVIEW)
    assert lines[0].startswith("the prompt of example train-0")
    assert lines[1:3] == ["Q: [bold]one[/bold] ?", "A:"], "brackets of the data are no markup"
    assert lines[4:] == [
        "tokens a prompt: 900 to 1,100, mean 1,000",
        "split requests answered already tokens in tokens out, at most",
        "train 3,000 1,000 2,000,000 512,000",
        "test 500 0 500,000 128,000",
        "and, for wrong votes, at most 4,000 requests with a hint",
        "cost: 12.35 EUR at most",
        "Nothing was asked, nothing was written.",
    ]


def test_a_preview_says_what_it_only_guesses() -> None:
    text = "\n".join(_shown(show_preview, _but(PREVIEW, exact=False, most_cost=None, most_hinted=0)))
    assert "tokens a prompt: about 900 to 1,100" in text
    assert "a token is taken for 4 characters" in text
    assert "about 2,000,000" in text
    assert "cost: unknown: the recipe has no rationales.prices" in text
    assert "hint" not in text
    assert "cost: about 12.35 EUR at most" in _shown(show_preview, _but(PREVIEW, exact=False))


def test_a_preview_of_hints_knows_their_cost_too() -> None:
    lines = _shown(show_preview, _but(PREVIEW, most_hint_cost=3.456))
    assert "and, for wrong votes, at most 4,000 requests with a hint, which cost 3.46 EUR" in lines


def _counts(**changes: Any) -> dict[str, Any]:
    funnel = Funnel(examples=500, asked=2_000, completed=1_990, parsed=1_900, agreed=1_500, kept=1_400)
    funnel.known, funnel.right = 500, 375
    return funnel.report() | changes


def test_a_funnel_shows_each_step_and_why_the_rest_fell_out() -> None:
    dropped = {"not completed": 10, "unparsable: empty": 90, "rule: agrees_with_label": 500}
    train = _counts(dropped=dropped, kept_hinted=7, cut=12)
    lines = _shown(show_funnel, {"train": train, "validation": _counts(known=0, right=0, accuracy=None)})
    assert lines == [
        "split examples asked completed parsed agreed kept votes right",
        "train 500 2,000 1,990 1,900 1,500 1,400 75.00% of 500",
        "validation 500 2,000 1,990 1,900 1,500 1,400 no labels",
        "train: 10 not completed; 90 unparsable: empty; 500 rule: agrees_with_label; 7 kept with a hint; "
        "12 cut at max_new_tokens",
    ]


def test_a_ledger_is_one_line_and_none_where_nothing_was_computed() -> None:
    spent = Spent(1_210, 8, 2, 1_200, 1_000_000, 200_000, 60.0)
    assert _shown(show_ledger, ledger_report({"train": spent}, Prices(input_per_million=2, output_per_million=10))) == [
        "spent: 1,210 requests, 8 of them retries, 2 failed; 1,000,000 tokens in, 200,000 out; 60 s, 20,000 tokens/s, "
        "4.0000 USD"
    ]
    plain = Spent(requests=5, completions=5, tokens_in=50, tokens_out=50, seconds=2.0)
    assert _shown(show_ledger, ledger_report({"train": plain}, Prices())) == [
        "spent: 5 requests; 50 tokens in, 50 out; 2 s, 50 tokens/s"
    ]
    assert _shown(show_ledger, ledger_report({"train": Spent(requests=5, seconds=0.2)}, Prices())) == []
    assert _shown(show_ledger, ledger_report({"train": plain}, Prices(), latest={"train": plain})) == [
        "spent: 5 requests; 50 tokens in, 50 out; 2 s, 50 tokens/s"
    ]


def test_a_ledger_of_several_commands_tells_what_the_last_one_took() -> None:
    all_of_it = Spent(requests=5, completions=5, tokens_in=50, tokens_out=50, seconds=2.0)
    last = Spent(requests=2, completions=2, tokens_in=20, tokens_out=30, seconds=1.0)
    assert _shown(show_ledger, ledger_report({"train": all_of_it}, Prices(), latest={"train": last})) == [
        "spent: 5 requests; 50 tokens in, 50 out; 2 s, 50 tokens/s",
        "of it the last time: 2 requests; 20 tokens in, 30 out; 1 s, 50 tokens/s",
    ]


def test_a_funnel_without_a_rationale_is_a_warning() -> None:
    lines = _shown(show_funnel, {"train": _counts(kept=0, dropped={"unparsable: no answer sentence": 1_990})})
    assert any(line.startswith("warning: not one rationale was kept.") for line in lines)
    assert not any(line.startswith("warning") for line in _shown(show_funnel, {"train": _counts()}))


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.yaml").write_text(
        "name: tiny\n"
        "task: {kind: shop, products: 20, train_size: 12, validation_size: 4, test_size: 4}\n"
        "rationales: {teacher: {kind: gold}}\n"
        "student: {config: {model_type: t5, d_model: 16}, tokenizer: {kind: words}}\n"
        "objective: [{name: label, loss: {kind: cross_entropy}, targets: [label]}]\n"
        "train: {max_steps: 3}\n"
    )
    return tmp_path


def _typed(*words: str, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["distill-llm", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_a_dry_run_leaves_no_trace(shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert _typed("generate-rationales", "shop.yaml", "--dry-run", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "the prompt of example train-0-0" in said
    assert "Nothing was asked, nothing was written." in said
    assert [path.name for path in shop.iterdir()] == ["shop.yaml"]


def test_a_dry_run_tells_all_although_the_server_is_not_there(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    served = "rationales.teacher={kind: openai_compatible, model: big, base_url: 'http://127.0.0.1:9/v1'}"
    prices = "rationales.prices={input_per_million: 1, output_per_million: 2}"
    words = ("generate-rationales", "shop.yaml", "--dry-run", served, prices)
    assert _typed(*words, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr()
    assert "train        12" in said.out
    assert "USD at most" in said.out
    assert said.err.startswith("error: rationales.teacher.base_url: cannot connect to http://127.0.0.1:9/v1")
    assert [path.name for path in shop.iterdir()] == ["shop.yaml"]


def test_an_interrupt_says_what_it_took_and_how_to_go_on(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def complete(self: GoldTeacher, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        for number, request in enumerate(requests):
            if number == 3:
                raise KeyboardInterrupt
            yield request, Completion("so ann", tokens_in=4, tokens_out=2)

    monkeypatch.setattr(GoldTeacher, "complete", complete)
    words = ("generate-rationales", "shop.yaml", "rationales.keep=[]")
    assert _typed(*words, monkeypatch=monkeypatch) == 130
    said = capsys.readouterr()
    assert "spent: 3 requests; 12 tokens in, 6 out" in said.out
    assert said.err.splitlines() == [
        "error: interrupted; what was finished is kept.",
        "To go on: distill-llm generate-rationales shop.yaml 'rationales.keep=[]'",
    ]


def test_a_used_up_budget_has_an_exit_code_of_its_own(shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = ("-q", "generate-rationales", "shop.yaml")
    assert _typed(*words, "rationales.budget.max_requests=5", monkeypatch=monkeypatch) == 3
    error = " ".join(capsys.readouterr().err.split())
    assert "rationales.budget.max_requests: 5: the budget is used up with 5 of 12 completions there" in error
    journal = shop / "runs" / "tiny" / "rationales" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 5
    assert _typed(*words, "rationales.budget.max_requests=12", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "Next: distill-llm train shop.yaml rationales.budget.max_requests=12\n" in said
    keys = [json.loads(line)["key"] for line in journal.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 12
