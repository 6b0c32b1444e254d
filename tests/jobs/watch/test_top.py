"""The terminal's view of a run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli import app
from jobs.watch.top import BAR, ROWS, STYLES, bar, sparkline, top
from tests.support.made_run import make_run


def printed(folder: Path, width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width)
    top(folder, once=True, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_finished_run(tmp_path: Path) -> None:
    text = printed(make_run(tmp_path).path)
    assert "made  completed  step 60 of 60  6 workers in 2 stages  generation 3" in text
    assert "loss █" in text and "2.1047" in text
    rows = [line.split() for line in text.splitlines() if "%" in line and "█" in line]
    # stage and layers stand before a stage's first worker alone
    assert [row[-4:-2] for row in rows] == [[str(worker), "4"] for worker in (0, 2, 4, 1, 3, 6)]
    assert all(0 < int(row[-1].rstrip("%")) < 100 for row in rows)
    assert "worker 5 lost (process died): 6 -> 5 workers" in text and "worker 6 joined" in text
    assert "checkpoint written" not in text


def test_many_workers_fit(tmp_path: Path) -> None:
    text = printed(make_run(tmp_path, 256, 4, 512, steps=3, finished=False).path)
    assert "256 workers in 4 stages" in text
    assert text.count("and 54 between") == 4
    assert len(text.splitlines()) < ROWS + 20


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    text = printed(make_run(tmp_path, steps=0, finished=False).path)
    assert "running  step 0 of 60" in text and "no step's times are on record" in text


def test_names_are_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=2, finished=False, name="[red]run[bold]")
    assert "[red]run[bold]" in printed(folder.path)


def test_no_run_there(tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["top", str(tmp_path), "--once"])
    assert refused.exit_code == 2 and "holds no run" in refused.output


@pytest.mark.parametrize(
    ("values", "line"),
    [([], ""), ([1.0], "▄"), ([2.0, 2.0], "▄▄"), ([0.0, None, 7.0], "▁█"), ([0.0, 1.0, 2.0, 3.0], "▁▃▆█")],
)
def test_sparkline(values: list[float | None], line: str) -> None:
    assert sparkline(values) == line


def test_a_long_sparkline_is_of_means() -> None:
    line = sparkline([float(value // 100) for value in range(1000)], width=10)
    assert len(line) == 10 and list(line) == sorted(line)


@pytest.mark.parametrize(
    "mix",
    [
        {"forward": 0.5, "backward": 0.5},
        {"forward": 0.21, "backward": 0.33, "reduce": 0.03, "wait": 0.3, "idle": 0.13},
        dict.fromkeys(STYLES, 1 / len(STYLES)),
    ],
)
def test_a_bar_is_as_long_as_a_step(mix: dict[str, float]) -> None:
    assert len(bar(mix)) == BAR
