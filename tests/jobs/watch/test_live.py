"""The page, the terminal and the trace of a run on real Ray, while it goes on and after it has ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.cluster import RayRun, connect, gcs_address
from jobs.assembly import assemble, run_settings
from jobs.cli import app
from jobs.watch.app import build
from jobs.watch.record import RunRecord
from jobs.watch.source import ControllerSource, source_of
from runtime.run_folder import RunFolder
from runtime.spans import KINDS
from tests.support.browser import chromium, listening, needs_chromium, page
from tests.support.ray_jobs import toy_recipe, wait_until

pytestmark = [pytest.mark.ray, needs_chromium]

PATIENCE = 60_000
"""Milliseconds that the page may take on a busy machine."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connect(None, 3, 0.25, 0):
        yield


@pytest.fixture
def run(tmp_path: Path, cluster: None) -> Iterator[tuple[RayRun, RunFolder]]:
    """Three workers, of which one may be lost, and steps that leave the processor to the browser."""
    recipe = toy_recipe(
        "live",
        1_000_000,
        3,
        2,
        data={"build": "tests.support.ray_jobs:build_paced_tokens", "arguments": {"seconds": 0.05}},
    )
    folder = RunFolder.create(tmp_path / "live", recipe.to_toml(), {"device": "cpu"})
    settings = run_settings(recipe, folder.path)
    folder.note_controller(address=gcs_address(), name=settings.name)
    job = assemble(recipe, str(folder.checkpoints))
    with RayRun(job, settings) as begun:
        yield begun, folder


def record_of(source: Any) -> RunRecord:
    record = RunRecord(source)
    record.follow()
    return record


def kinds(record: RunRecord, step: int) -> set[str]:
    line = next((line for line in record.timeline if line["step"] == step), {"workers": {}})
    return {KINDS[kind] for flat in line["workers"].values() for kind in flat[::4]}


def step_shown(shown: Any) -> int:
    text: str = shown.locator("#step").inner_text()
    return int(text.split("/")[0].replace(",", "").strip().replace("-", "0"))


def test_a_run_is_followed_through_losses_to_its_end(run: tuple[RayRun, RunFolder], tmp_path: Path) -> None:
    begun, folder = run
    remote = ControllerSource(RayRun.find(begun.name))
    with (
        chromium() as browser,
        listening(build(folder)) as here,
        listening(build(remote)) as there,
        page(browser, here) as near,
        page(browser, there, "dark") as far,
    ):
        for shown in (near, far):
            shown.set_default_timeout(PATIENCE)
            shown.locator("#state:has-text('running')").wait_for()
            assert shown.locator("#grid [role=gridcell]").count() == 3
        wait_until(lambda: step_shown(near) >= 5 and step_shown(far) >= 5, "both pages follow")

        os.kill(begun.processes()[2], signal.SIGKILL)
        for shown in (near, far):
            shown.locator("#events li.good", has_text="recovered in").click()  # others may follow at once
            shown.locator("#workers:has-text('2')").wait_for()
            shown.locator("#plans .chip.gone").wait_for()
            assert shown.locator("#plans .chip.gone").inner_text().split()[0] == "2"

        os.kill(begun.controller_process(), signal.SIGKILL)
        for shown in (near, far):
            shown.locator("#events li", has_text="a new controller watches 2 workers").wait_for()
            reached = step_shown(shown)
            wait_until(lambda shown=shown, reached=reached: step_shown(shown) > reached + 3, "it goes on")

        begun.stop()
        wait_until(lambda: begun.wait(0.1), "the end")
        for shown in (near, far):
            shown.locator("#state:has-text('interrupted')").wait_for()
        near.screenshot(path=str(tmp_path / "live.png"), full_page=True)

    with source_of(folder.path) as source:
        record = record_of(source)
    recovered = next(each.event for each in record.events if type(each.event).__name__ == "Recovered")
    assert "recovery" in kinds(record, recovered.from_version + 1), "kept, though a controller died since"
    newest = max(record.steps)
    assert {"forward", "backward", "wait", "reduce", "exchange"} <= kinds(record, newest)
    assert record.books[-1].goodput > 0 and record.unreadable == 0
    command = CliRunner()
    shown_once = command.invoke(app, ["top", str(folder.path), "--once"])
    assert shown_once.exit_code == 0 and "interrupted" in shown_once.output
    saved = command.invoke(app, ["trace", str(folder.path), "-o", str(tmp_path / "trace.json")])
    assert saved.exit_code == 0 and (tmp_path / "trace.json").stat().st_size > 1000
