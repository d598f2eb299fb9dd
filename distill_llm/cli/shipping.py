"""What a run will take before it begins, and what becomes of it when it is finished: pushed to the Hub, exported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill_llm.cli.terminal import Overrides, RecipePath, RunPath, console, plain, progress_bars, show_next

if TYPE_CHECKING:
    from distill_llm.hub.upload import Pushed

app = typer.Typer()


@app.command("push-rationales")
def push_rationales(
    run: RunPath,
    repo_id: Annotated[str, typer.Option(help="the data set's name on the Hub: owner/name")],
    public: Annotated[bool, typer.Option("--public", help="anybody may read it; private otherwise")] = False,
    licence: Annotated[str, typer.Option(help="the licence that you give the data set, such as cc-by-4.0")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would be sent; send nothing")] = False,
) -> None:
    """Push a run's rationale data set, with its card, to the Hugging Face Hub in one commit."""
    from distill_llm.cli.rationales import show_uploads
    from distill_llm.pipeline.publish import licence_warnings, plan_push
    from distill_llm.pipeline.publish import push_rationales as push

    _, recipe, files = plan_push(run)
    for warning in licence_warnings(recipe):
        console().print(f"[yellow]warning:[/yellow] {plain(warning)}", highlight=False, soft_wrap=True)
    if dry_run:
        show_uploads(files, console())
        return
    _show_pushed(push(run, repo_id, private=not public, licence=licence))


def _show_pushed(pushed: Pushed) -> None:
    kind = "private" if pushed.private else "public"
    done = f"Pushed ({kind})" if pushed.changed else f"Nothing to do, all of it is there ({kind})"
    console().print(f"{done}: {pushed.url}", highlight=False, soft_wrap=True)


@app.command()
def export(
    run: RunPath,
    formats: Annotated[
        list[str],
        typer.Option("--format", help="such as onnx-int8; may be given several times; all: all that are here"),
    ],
    arm: Annotated[str, typer.Option(help="which of the run's models")] = "student",
    examples: Annotated[int, typer.Option(min=1, help="test examples that each export is asked")] = 200,
    force: Annotated[bool, typer.Option("--force", help="export anew what is there already")] = False,
) -> None:
    """Write a run's model for other runtimes; each is loaded there again and held against the student."""
    from distill_llm.evaluation.export_report import export_notes, export_table
    from distill_llm.pipeline.export_stage import export_model

    with progress_bars() as progress:
        reports = export_model(run, formats, arm=arm, examples=examples, force=force, progress=progress)
    shown = console()
    shown.print(export_table(reports))
    for note in export_notes(reports):
        shown.print(note, highlight=False)
    shown.print(f"Exports: {Path(run) / 'exports' / arm}", highlight=False)
    named = "" if arm == "student" else f" --arm {arm}"
    show_next(f"distill-llm push {run} --exports{named} --repo-id OWNER/NAME")


@app.command()
def push(
    run: RunPath,
    repo_id: Annotated[str, typer.Option(help="the model's name on the Hub: owner/name")],
    arm: Annotated[str, typer.Option(help="which of the run's models")] = "student",
    public: Annotated[bool, typer.Option("--public", help="anybody may read it; private otherwise")] = False,
    licence: Annotated[str, typer.Option(help="the licence that you give the model, such as apache-2.0")] = "",
    merge: Annotated[bool, typer.Option("--merge", help="send an adapter merged into its base")] = False,
    rationales: Annotated[bool, typer.Option("--rationales", help="send the rationale data set along")] = False,
    exports: Annotated[bool, typer.Option("--exports", help="send what `export` made along")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would be sent; send nothing")] = False,
) -> None:
    """Push a run's model, with a card that shows how it was made and scored, to the Hub in one commit."""
    from distill_llm.cli.rationales import show_uploads
    from distill_llm.pipeline.publish_model import plan_model_push, push_model

    options = {"arm": arm, "licence": licence, "merge": merge, "rationales": rationales, "exports": exports}
    plan = plan_model_push(run, repo_id, **options)
    for warning in plan.warnings:
        console().print(f"[yellow]warning:[/yellow] {plain(warning)}", highlight=False, soft_wrap=True)
    console().print(f"The card: {plan.files['README.md']}", highlight=False, soft_wrap=True)
    if dry_run:
        show_uploads(plan.uploads, console())
        return
    _show_pushed(push_model(plan, private=not public))


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    memory: Annotated[str, typer.Option(help="what may be taken, such as 16GiB; empty: what is free")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, or a GPU by name: a100, h100, 4090, t4, l4")] = "",
) -> None:
    """Memory, disk, tokens and time of a recipe, before weights are loaded. Exit code 0: it fits; 1: it does not."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from distill_llm.cli.plan import show_plan, show_verdict
    from distill_llm.pipeline.place import parse_bytes, simulated_device
    from distill_llm.pipeline.plan_advice import advise, in_order
    from distill_llm.pipeline.planner import begin, finish
    from distill_llm.recipe.load import load_recipe

    typed = [recipe, *(overrides or [])]
    limit = parse_bytes(memory, where="--memory") if memory else None
    simulated_device(device)  # a wrong name is told before anything is read
    loaded = load_recipe(recipe, overrides or []).resolved()
    with TemporaryDirectory() as folder:
        ground, machine = begin(loaded, Path(folder), device)
        made = finish(loaded, ground, machine, limit)
        show_plan(made, console())
        advice = []
        if made.memories.peak.total > made.limit:
            advice = in_order(advise(made, ground, lambda more: load_recipe(recipe, [*(overrides or []), *more])))
        show_verdict(made, advice, typed, console())
    if not made.fits:
        raise typer.Exit(1)
