"""``distill-llm recipe``: look at recipes before anything is run."""

from __future__ import annotations

import typer

from distill_llm.cli.terminal import Overrides, RecipePath

app = typer.Typer(no_args_is_help=True, help="Show, check and list recipes; their JSON schema for editors.")


@app.command()
def show(recipe: RecipePath, overrides: Overrides = None) -> None:
    """The recipe with every default filled in, as YAML; the stages of its scheme, if it has several, as comments."""
    import yaml

    from distill_llm.recipe.load import load_recipe
    from distill_llm.schemes.stages import outline

    loaded = load_recipe(recipe, overrides or [])
    for line in outline(loaded.stages):
        typer.echo(f"# {line}")
    typer.echo(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Whether the recipe is valid. Reads no data and no weights."""
    from distill_llm.recipe.load import load_recipe
    from distill_llm.schemes.stages import outline

    loaded = load_recipe(recipe, overrides or [])
    typer.echo(f"{recipe}: valid; it fills {loaded.folder}")
    for line in outline(loaded.stages):
        typer.echo(f"  {line}")


@app.command()
def schema() -> None:
    """The JSON schema of a recipe, for editors."""
    import json

    from distill_llm.recipe.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command("list")
def list_recipes() -> None:
    """The recipes that came with the package, with the first line of each."""
    from distill_llm.core.assets import asset_root

    root = asset_root()
    for path in sorted((root / "recipes").rglob("*.yaml")):
        first = path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
        typer.echo(f"{path.relative_to(root)}  {first}")
