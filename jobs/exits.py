"""How the commands end: exit codes that scripts can use, and one sentence for a mistake."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

RUN_ERROR = 1
"""A run that failed, bits that differ, a stop that left no checkpoint, a damaged one, a disk that fails."""

USER_ERROR = 2
"""A mistake in recipe or arguments: trying again will not help."""

UNDER_WAY = 3
"""``status`` of a run that waits or goes on."""

CONTACT_LOST = 4
"""The cluster answered and does not any more; the run may go on."""

INTERRUPTED = 130
"""Stopped before its end; it can be resumed."""


class RunFailed(RuntimeError):
    """The run ended without reaching its last step; the text says why."""


@contextmanager
def errors() -> Iterator[None]:
    """Turns exceptions into a sentence on standard error and an exit code."""
    # a user's own modules lie beside the recipe's caller, where the console script does not look
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        typer.echo(f"reknit: {error}", err=True)
        raise typer.Exit(USER_ERROR) from None
    except RunFailed as error:
        typer.echo(f"reknit: the run failed: {error}", err=True)
        raise typer.Exit(RUN_ERROR) from None
    except ConnectionError as error:
        typer.echo(f"reknit: {error}", err=True)
        raise typer.Exit(CONTACT_LOST) from None
    except OSError as error:
        typer.echo(f"reknit: {error}", err=True)
        raise typer.Exit(RUN_ERROR) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        from runtime.checkpoint import CheckpointDamaged  # commands that read none begin without it

        if not isinstance(error, CheckpointDamaged):
            raise
        typer.echo(f"reknit: {error}", err=True)
        raise typer.Exit(RUN_ERROR) from None
