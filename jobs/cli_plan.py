"""``reknit plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.exits import errors

plan_app = typer.Typer()


@plan_app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe (a TOML file).")],
    workers: Annotated[int | None, typer.Option(help="How many (default: the recipe's).")] = None,
    memory: Annotated[
        str | None, typer.Option(help="What each worker has, such as 80GiB (default: plenty).")
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(help="Bytes per second between two workers (default: the recipe's [fabric])."),
    ] = None,
    rows: Annotated[int, typer.Option(help="How many strategies the table has.")] = 10,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides a value of the recipe.")
    ] = None,
) -> None:
    """Profiles a recipe's model here and explains which strategy suits so many workers best."""
    with errors():
        from jobs.plan import show_plan
        from jobs.terminal import table_console

        show_plan(recipe, settings or (), workers, memory, link, rows, table_console())
