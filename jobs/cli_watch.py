"""The commands that show a run: on a page, in a terminal, as a trace, by its held-out loss."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.exits import errors
from jobs.terminal import plain_console

watch_app = typer.Typer()

RunOrName = Annotated[str, typer.Argument(help="A run's folder, or its name on this process's Ray cluster.")]


@watch_app.command()
def dashboard(
    run: RunOrName,
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 lets other machines look.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen; 0 takes any free one.")] = 8270,
    names: Annotated[
        list[str] | None, typer.Option("--name", help="What browsers call this machine, if not localhost.")
    ] = None,
) -> None:
    """Serves one page on which a run is seen, live or finished."""
    with errors():
        from jobs.watch.serve import dashboard as show

        show(run, host=host, port=port, names=names or (), console=plain_console())


@watch_app.command()
def top(
    run: RunOrName,
    once: Annotated[bool, typer.Option("--once", help="Prints what there is and returns.")] = False,
) -> None:
    """Shows a run in the terminal, live or finished."""
    with errors():
        from jobs.watch.top import top as show

        show(run, once=once, console=plain_console())


@watch_app.command()
def trace(
    run: RunOrName,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file that is written.")] = Path(
        "trace.json"
    ),
) -> None:
    """Saves a run's timeline for Perfetto (ui.perfetto.dev) or chrome://tracing."""
    with errors():
        from jobs.watch.source import source_of
        from jobs.watch.trace import write_trace

        with source_of(run) as source:
            spans = write_trace(source, output)
        plain_console().print(f"{output}: {spans:,} spans", highlight=False, soft_wrap=True)


@watch_app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    stages: Annotated[
        int | None, typer.Option(help="Of which half is every other (default: [paths]'s).")
    ] = None,
    micro_batches: Annotated[
        int | None, typer.Option(help="Held out (default: the recipe's).", min=1)
    ] = None,
) -> None:
    """Says the held-out loss and perplexity of a run's newest checkpoint, at full and at half depth."""
    with errors():
        from jobs.evaluate import evaluate as losses

        losses(run, plain_console(), stages=stages, micro_batches=micro_batches)
