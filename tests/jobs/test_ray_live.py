"""A run on real Ray as people look at it: the page, the terminal, the trace, the training dashboard.

One run loses a worker and its controller and is stopped; browsers and a Prometheus are there from the start.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from actors.cluster import RayRun
from jobs.cli import app
from jobs.dashboards.alerts import ALERTS
from jobs.dashboards.training import TRAINING
from jobs.monitoring import monitoring
from jobs.watch.app import build
from jobs.watch.record import RunRecord
from jobs.watch.source import ControllerSource, source_of
from runtime.events import Recovered
from runtime.run_folder import RunFolder
from runtime.spans import KINDS
from runtime.worker_metrics import PARTS
from tests.support.browser import chromium, listening, needs_chromium, page
from tests.support.prometheus import Prometheus, asked, needs_prometheus, prometheus
from tests.support.ray_cluster import local_ray
from tests.support.ray_jobs import toy_recipe, wait_until
from tests.support.watched import start

pytestmark = pytest.mark.ray

WORKERS = 3
VICTIM = 2
PATIENCE = 60_000
"""Milliseconds that the page may take on a busy machine."""


@dataclass
class Live:
    run: RayRun
    folder: RunFolder
    targets: Path
    """Where Prometheus looks for runs."""

    def lose(self) -> Recovered:
        """Kills ``VICTIM`` unless that has been done; the recovery from it."""
        if self.recovery() is None:
            os.kill(self.run.processes()[VICTIM], signal.SIGKILL)
        recovered: Recovered = wait_until(self.recovery, "the recovery")
        return recovered

    def recovery(self) -> Recovered | None:
        events = self.run.progress(1 << 30, 0).events
        return next((event for event in events if isinstance(event, Recovered)), None)

    def end(self) -> None:
        self.run.stop()
        wait_until(lambda: self.run.wait(1.0), "the end")
        self.run.finish()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Steps that leave the processor to the browser."""
    base = tmp_path_factory.mktemp("live")
    targets = base / "targets"
    recipe = toy_recipe(
        "live",
        1_000_000,
        WORKERS,
        2,
        data={
            "build": "tests.support.toys:build_paced_tokens",
            "arguments": {"seconds": 0.1},
            "held_out_every": 5,
            "held_out_micro_batches": 2,
        },
        checkpoint={"every": 20, "keep": 2},
        # nobody knows what a CPU can do, so the recipe says it
        metrics={"targets": str(targets), "peak_flops": 1e9},
    )
    with local_ray(1), start(base / "live", recipe) as run:
        wait_until(lambda: run.progress(1 << 30, 1 << 30).steps_total, "the first step")
        yield Live(run, RunFolder(base / "live"), targets)


@pytest.fixture(scope="module")
def pages(live: Live) -> Iterator[tuple[Any, Any]]:
    """The page by the run's folder, and that by its controller."""
    remote = ControllerSource(RayRun.find(live.run.name))
    with (
        chromium() as browser,
        listening(build(live.folder)) as here,
        listening(build(remote)) as there,
        page(browser, here) as near,
        page(browser, there, "dark") as far,
    ):
        for shown in (near, far):
            shown.set_default_timeout(PATIENCE)
        yield near, far


@pytest.fixture(scope="module")
def server(live: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    base = tmp_path_factory.mktemp("monitoring")
    settings = monitoring(base / "monitoring", targets=live.targets, interval="1s")
    with prometheus(settings, base / "prometheus") as running:
        yield running


def step_shown(shown: Any) -> int:
    text: str = shown.locator("#step").inner_text()
    return int(text.split("/")[0].replace(",", "").strip().replace("-", "0"))


def workers_seen(server: Prometheus) -> set[str]:
    found = server.query("count by (worker) (reknit_worker_steps_total)")
    return {dict(labels)["worker"] for labels in found}


def expression(title: str) -> str:
    """That of the panel's first series, as it is asked."""
    (panel,) = [each for each in TRAINING.panels if each.title == title]
    return asked(panel.series[0].expr)


def is_positive(server: Prometheus, title: str) -> bool:
    return max(server.query(expression(title)).values(), default=0.0) > 0


@needs_chromium
def test_pages_follow_a_run(pages: tuple[Any, Any]) -> None:
    for shown in pages:
        shown.locator("#state:has-text('running')").wait_for()
        assert shown.locator("#grid [role=gridcell]").count() == WORKERS
    wait_until(lambda: all(step_shown(shown) >= 5 for shown in pages), "both pages follow")


@needs_prometheus
def test_prometheus_finds_the_run_and_all_its_workers(server: Prometheus) -> None:
    wait_until(lambda: len(workers_seen(server)) == WORKERS, "all workers")


@needs_chromium
def test_pages_show_a_recovery(live: Live, pages: tuple[Any, Any]) -> None:
    live.lose()
    for shown in pages:
        shown.locator("#events li.good", has_text="recovered in").click()  # others may follow at once
        shown.locator(f"#workers:has-text('{WORKERS - 1}')").wait_for()
        shown.locator("#plans .chip.gone").wait_for()
        assert shown.locator("#plans .chip.gone").inner_text().split()[0] == str(VICTIM)


@needs_prometheus
def test_every_panel_has_data_of_a_run_that_lost_a_worker(live: Live, server: Prometheus) -> None:
    live.lose()
    server.wait_for_data(TRAINING, run="live")
    for mark in TRAINING.marks:
        wait_until(partial(server.query, asked(mark.expr, window="1m")), mark.name)

    wait_until(lambda: workers_seen(server) == {"0", "1"}, "the series of who is gone have ended")
    wait_until(lambda: server.value('reknit_workers{run="live"}') == WORKERS - 1, "the others are left")
    assert server.value("reknit_recoveries_total") == 1
    for title in ("Samples", "Model FLOPs utilisation (MFU)", "Data wait", "Pipeline bubble"):
        wait_until(partial(is_positive, server, title), title)
    shares = wait_until(partial(server.query, expression("Where the workers' time goes")), "shares")
    assert {dict(labels)["part"] for labels in shares} == set(PARTS)
    assert sum(shares.values()) == pytest.approx(1.0)

    rules = httpx.get(f"{server.url}/api/v1/rules", timeout=30).json()["data"]["groups"][0]["rules"]
    assert {rule["name"]: rule["health"] for rule in rules} == {alert.name: "ok" for alert in ALERTS}
    assert server.query('ALERTS{alertstate="firing"}') == {}


@needs_chromium
def test_pages_follow_a_run_to_its_next_controller(live: Live, pages: tuple[Any, Any]) -> None:
    live.lose()
    os.kill(live.run.controller_process(), signal.SIGKILL)
    for shown in pages:
        shown.locator("#events li", has_text=f"a new controller watches {WORKERS - 1} workers").wait_for()
        reached = step_shown(shown)
        wait_until(lambda shown=shown, reached=reached: step_shown(shown) > reached + 3, "it goes on")


@needs_chromium
def test_pages_show_the_end(live: Live, pages: tuple[Any, Any]) -> None:
    live.end()
    for shown in pages:
        shown.locator("#state:has-text('interrupted')").wait_for()


@needs_prometheus
def test_prometheus_knows_the_end(live: Live, server: Prometheus) -> None:
    live.end()
    assert list(live.targets.iterdir()) == [], "nobody looks for a run that has ended"
    wait_until(lambda: not server.query("reknit_step"), "Prometheus knows that it has ended")


def test_what_is_left_of_a_run_tells_it_all(live: Live, tmp_path: Path) -> None:
    recovered = live.lose()
    live.end()
    with source_of(live.folder.path) as source:
        record = RunRecord(source)
        record.follow()

    def kinds(step: int) -> set[str]:
        line = next((line for line in record.timeline if line["step"] == step), {"workers": {}})
        return {KINDS[kind] for flat in line["workers"].values() for kind in flat[::4]}

    assert "recovery" in kinds(recovered.from_version + 1), "kept, though a controller died since"
    assert {"forward", "backward", "wait", "reduce", "exchange"} <= kinds(max(record.steps))
    assert record.books[-1].goodput > 0 and record.unreadable == 0
    command = CliRunner()
    shown_once = command.invoke(app, ["top", str(live.folder.path), "--once"])
    assert shown_once.exit_code == 0 and "interrupted" in shown_once.output
    saved = command.invoke(app, ["trace", str(live.folder.path), "-o", str(tmp_path / "trace.json")])
    assert saved.exit_code == 0 and (tmp_path / "trace.json").stat().st_size > 1000
