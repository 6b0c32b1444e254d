"""The live table of a run on a terminal; plain lines where the output is no terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.live import Live
from rich.table import Table

from actors.recorder import RunProgress
from runtime.events import StepRecord

ROWS = 8
"""Steps that the table shows."""

LINE_SECONDS = 5.0
"""Without a terminal, a step's line appears at most this often."""


class Display:
    """Shows progress as it comes. Use it as a context manager."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._recent: deque[StepRecord] = deque(maxlen=ROWS)
        self._live = (
            Live(console=console, refresh_per_second=8, redirect_stdout=False)
            if console.is_terminal
            else None
        )
        self._last_line = -LINE_SECONDS
        self._goodput = 0.0

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, progress: RunProgress) -> None:
        """Takes in what is new."""
        self._goodput = progress.goodput
        self._recent.extend(progress.steps)
        for line in progress.lines:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        if self._live:
            self._live.update(self._table())
        elif progress.steps and (
            self._clock() - self._last_line >= LINE_SECONDS or progress.outcome is not None
        ):
            self._last_line = self._clock()
            self._console.print(_line(progress.steps[-1], self._goodput), highlight=False, soft_wrap=True)

    def say(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table()
        for name in ("step", "loss", "held-out", "tokens/s", "step s", "workers", "goodput"):
            table.add_column(name, justify="right")
        for record in self._recent:
            table.add_row(*_cells(record, self._goodput if record is self._recent[-1] else None))
        return table


def _cells(record: StepRecord, goodput: float | None) -> tuple[str, ...]:
    return (
        str(record.step),
        f"{record.loss:.4f}",
        _held_out(record),
        f"{record.tokens / record.seconds:,.0f}" if record.seconds > 0 else "",
        f"{record.seconds:.3f}",
        str(record.workers),
        "" if goodput is None else f"{goodput:.1%}",
    )


def _held_out(record: StepRecord) -> str:
    if record.held_out_loss is None:
        return ""
    half = "" if record.half_depth_loss is None else f" (half depth {record.half_depth_loss:.4f})"
    return f"{record.held_out_loss:.4f}{half}"


def _line(record: StepRecord, goodput: float) -> str:
    held_out = f"  held-out {_held_out(record)}" if record.held_out_loss is not None else ""
    return (
        f"step {record.step}  loss {record.loss:.4f}{held_out}  "
        f"{record.tokens / record.seconds:,.0f} tokens/s  {record.workers} workers  goodput {goodput:.1%}"
    )
