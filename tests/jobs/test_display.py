"""What a run says of itself, as it is printed: word for word, whatever is in it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.recorder import RunProgress
from jobs.chaos import _live_through
from jobs.display import Display
from jobs.exits import RunFailed

LINES = (
    "step 3  worker 1 failed: KeyError('[/INST]')",
    "step 4  worker 2 failed: RuntimeError: [enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator",
    "step 5  worker 3 failed: ValueError('[bold]no[/bold]')",
)


def progress(lines: tuple[str, ...]) -> RunProgress:
    return RunProgress((), 0, (), lines, 0.5, 1, "failed", "it failed")


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_of_events_are_no_markup(terminal: bool) -> None:
    stream = io.StringIO()
    with Display(
        Console(file=stream, force_terminal=terminal, no_color=True, width=200), lambda: 0.0
    ) as shown:
        shown.show(progress(LINES))
    for line in LINES:
        assert line in stream.getvalue()


def test_nor_are_they_under_chaos() -> None:
    class Ended:
        """The first look finds some lines, the one after the end the others."""

        def __init__(self) -> None:
            self.left = [progress(LINES[:2]), progress(LINES[2:])]

        def wait(self, _: float) -> bool:
            return False

        def finish(self) -> None:
            """It has ended."""

        def progress(self, *_: int) -> RunProgress:
            return self.left.pop(0)

    stream, run = io.StringIO(), Ended()
    striker: Any = None
    with pytest.raises(RunFailed, match="it failed"):
        _live_through(run, striker, [], 1.0, Console(file=stream, width=200))  # type: ignore[arg-type]
    assert stream.getvalue().splitlines() == list(LINES)


def test_paths_are_printed_as_they_are(tmp_path: Path) -> None:
    from jobs.kubernetes import render
    from jobs.pods import Machines

    stream = io.StringIO()
    folder = tmp_path / "[team]" / "out"
    recipe = Path(__file__).parent.parent.parent / "jobs" / "recipes" / "gpt-small.toml"
    render(recipe, Machines("reknit:0.1.0"), output=folder, console=Console(file=stream))
    assert f"kubectl apply -k {folder}/overlays/train" in stream.getvalue().splitlines()
