"""Where commands print: text as it is, whose brackets are nobody's markup."""

from __future__ import annotations

import sys

from rich.console import Console

_PIPED_COLUMNS = 160


def plain_console() -> Console:
    """Standard output as it is now, wherever it is redirected to later."""
    return Console(file=sys.stdout, markup=False)


def table_console() -> Console:
    """Standard output. Where that is no terminal, it is wide enough for tables: rich takes 80 columns for
    granted then, and breaks the words of every heading."""
    return Console(file=sys.stdout, markup=False, width=None if sys.stdout.isatty() else _PIPED_COLUMNS)
