"""What the command line shows of the first stage: a preview, and the funnel with the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from distill_llm.core.errors import ConfigError
from distill_llm.rationales.members import describe_dropped

if TYPE_CHECKING:
    from distill_llm.hub.upload import Upload
    from distill_llm.pipeline.preview import Preview


def show_preview(preview: Preview, console: Console) -> None:
    about = "" if preview.exact else "about "
    console.rule(f"the prompt of example {preview.example_id}", align="left")
    console.print(preview.prompt, markup=False, highlight=False)
    console.rule(align="left")
    least, mean, most = preview.tokens_a_request
    console.print(f"tokens a prompt: {about}{least:,} to {most:,}, mean {mean:,}", highlight=False)
    if not preview.exact:
        console.print("(a token is taken for 4 characters: the teacher's tokenizer is not at hand)", highlight=False)
    for name, reason in preview.failing.items():
        console.print(f"the teacher '{name}' would be dropped: {reason}", markup=False, highlight=False)
    table = _table("split", "requests", "answered already", "tokens in", "tokens out, at most")
    for part in preview.splits:
        table.add_row(
            part.split,
            f"{part.requests:,}",
            f"{part.answered:,}",
            f"{about}{part.tokens_in:,}",
            f"{part.most_tokens_out:,}",
        )
    console.print(table)
    if preview.most_hinted:
        cost = f", which cost {about}{preview.most_hint_cost:,.2f} {preview.currency}" if preview.most_hint_cost else ""
        console.print(
            f"and, for wrong votes, at most {preview.most_hinted:,} requests with a hint{cost}", highlight=False
        )
    cost = "unknown: the recipe has no rationales.prices"
    if preview.most_cost is not None:
        cost = f"{about}{preview.most_cost:,.2f} {preview.currency} at most"
    console.print(f"cost: {cost}", highlight=False)
    console.print("Nothing was asked, nothing was written.", highlight=False)
    if preview.problem:
        raise ConfigError(preview.problem)  # it shows here, and not only when somebody waits for answers


def show_funnel(funnel: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Of what was asked, how much is left at each step, and why the rest fell out."""
    table = _table("split", "examples", "asked", "completed", "parsed", "agreed", "kept", "votes right")
    for split, counts in funnel.items():
        accuracy = counts["accuracy"]
        table.add_row(
            split,
            *(f"{counts[name]:,}" for name in ("examples", "asked", "completed", "parsed", "agreed", "kept")),
            f"{accuracy:.2%} of {counts['known']:,}" if accuracy is not None else "no labels",
        )
    console.print(table)
    for split, counts in funnel.items():
        reasons = [f"{number:,} {reason}" for reason, number in counts["dropped"].items()]
        reasons += [f"{counts['kept_hinted']:,} kept with a hint"] if counts["kept_hinted"] else []
        reasons += [f"{counts['cut']:,} cut at max_new_tokens"] if counts["cut"] else []
        if reasons:
            console.print(f"{split}: {'; '.join(reasons)}", highlight=False)
    if funnel["train"]["completed"] and not funnel["train"]["kept"]:
        console.print(
            "warning: not one rationale was kept. rationales/journal.jsonl has the texts: look at some, then change "
            "the prompt, or the rules of `keep` (which asks for nothing again).",
            style="yellow",
            highlight=False,
        )
    _show_teachers(funnel, console)


def _show_teachers(funnel: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Each of several teachers' part."""
    table = _table("teacher", "split", "asked", "completed", "parsed", "kept", "right", "say in votes")
    for split, counts in funnel.items():
        for name, share in counts.get("teachers", {}).items():
            right = "no labels" if share["accuracy"] is None else f"{share['accuracy']:.2%} of {share['known']:,}"
            asked = (f"{share[key]:,}" for key in ("asked", "completed", "parsed", "kept"))
            table.add_row(name, split, *asked, right, f"{share['say']:.3g}")
    if table.row_count:
        console.print(table)
    for line in describe_dropped({split: counts.get("teachers", {}) for split, counts in funnel.items()}):
        console.print(line, markup=False, highlight=False)


def show_ledger(report: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """What it took: in all, and the last time that something was asked, where that is less."""
    total = report["total"]
    latest = report.get("latest", total)
    if total["seconds"] < 1 and not total["tokens_out"]:
        return  # nothing was computed: it was there already
    console.print(f"spent: {_spent(total)}", highlight=False)
    if latest["requests"] != total["requests"]:
        console.print(f"  of it the last time: {_spent(latest)}", highlight=False)
    for name, spent in report.get("teachers", {}).items():
        cost = f", {spent['cost']:,.4f} {spent['currency']}" if spent["cost"] is not None else ""
        console.print(
            f"  {name}: {spent['requests']:,} requests; {spent['tokens_in']:,} tokens in, {spent['tokens_out']:,} out; "
            f"{spent['seconds']:,.0f} s{cost}",
            highlight=False,
        )


def _spent(part: Mapping[str, Any]) -> str:
    retries = f", {part['retries']:,} of them retries" if part["retries"] else ""
    failures = f", {part['failures']:,} failed" if part["failures"] else ""
    cost = f", {part['cost']:,.4f} {part['currency']}" if part["cost"] is not None else ""
    return (
        f"{part['requests']:,} requests{retries}{failures}; {part['tokens_in']:,} tokens in, {part['tokens_out']:,} "
        f"out; {part['seconds']:,.0f} s, {part['tokens_per_second']:,.0f} tokens/s{cost}"
    )


def show_uploads(files: Sequence[Upload], console: Console) -> None:
    table = _table("file", "bytes")
    for upload in files:
        table.add_row(upload.path_in_repo, f"{upload.num_bytes:,}")
    console.print(table)
    console.print("Nothing was sent.", highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table
