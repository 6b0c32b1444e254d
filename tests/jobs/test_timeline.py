"""A schedule's table, pictures and files."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli import app
from jobs.timeline import picture, show_schedule
from strategies.schedules.even import even_plan
from strategies.schedules.registry import SCHEDULES, schedule_named
from strategies.schedules.simulation import StageSeconds, simulate

ONE = StageSeconds(1.0, 1.0, 1.0)


def test_the_picture_shows_who_does_what_when() -> None:
    timeline = simulate(schedule_named("gpipe", 1), even_plan(2, 2), [ONE] * 2)
    lines = [line.plain for line in picture(timeline, 36)]
    assert lines == [
        "   0 F0  F1  ............B0      B1      ",
        "   1 ....F0  F1  B0      B1      ........",
        "     F forward, B backward, . idle",
    ]


def test_files_say_what_the_table_says(tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=100)
    svg, spans = tmp_path / "a.svg", tmp_path / "a.json"
    timeline = show_schedule("zero-bubble", 4, 8, 1, ONE, console, svg=svg, spans=spans)
    assert isinstance(console.file, StringIO)
    assert "step 27 s, bubble 11.1%, peak activations 4 micro-batches" in console.file.getvalue()
    written = json.loads(spans.read_text())
    assert written["seconds"] == timeline.seconds == 27.0 and written["bubble"] == timeline.bubble
    assert len(written["spans"]) == 4 * 8 * 3
    assert {span["work"] for span in written["spans"]} == {"forward", "input gradient", "weight gradient"}
    bars = [e for e in ElementTree.parse(svg).iter() if e.tag.endswith("rect")]
    assert len(bars) == len(timeline.spans)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_command_knows_every_schedule(name: str) -> None:
    chunks = ["--chunks", "2"] if SCHEDULES[name].chunked else []
    result = CliRunner().invoke(app, ["schedule", name, "--stages", "2", "--micro-batches", "4", *chunks])
    assert result.exit_code == 0 and f"{name}: 2 stages x 4 micro-batches" in result.output


def test_the_command_refuses_what_cannot_be_done() -> None:
    for arguments in (
        ["2f2b"],
        ["gpipe", "--chunks", "2"],
        ["interleaved"],
        ["gpipe", "--micro-batches", "0"],
        ["gpipe", "--room", "4"],
        ["gpipe", "--taken", "2"],
        ["skippipe", "--taken", "5"],
    ):
        assert CliRunner().invoke(app, ["schedule", *arguments]).exit_code == 2


def test_paths_that_skip_stages_are_shown_beside_the_full_step() -> None:
    arguments = ["schedule", "skippipe", "--stages", "6", "--micro-batches", "24", "--taken", "4"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "6 stages x 24 micro-batches, 4 taken" in result.output
    (share,) = re.findall(r"all stages take 87 s: ([\d.]+)% of that; [1-9]\d* stages", result.output)
    assert 66.0 < float(share) < 80.0
