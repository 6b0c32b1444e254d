"""Every expression of the training dashboard, asked of a real Prometheus that scrapes a real run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from actors.cluster import RayRun, connect
from jobs.assembly import assemble, run_settings
from jobs.dashboards.alerts import ALERTS
from jobs.dashboards.training import TRAINING
from jobs.monitoring import monitoring
from runtime.events import Recovered
from runtime.run_folder import RunFolder
from runtime.worker_metrics import PARTS
from tests.support.prometheus import Prometheus, asked, needs_prometheus, prometheus
from tests.support.ray_jobs import toy_recipe, wait_until

pytestmark = [pytest.mark.ray, needs_prometheus]

VICTIM = 3


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    return tmp_path / "targets"


@pytest.fixture
def server(tmp_path: Path, targets: Path) -> Iterator[Prometheus]:
    settings = monitoring(tmp_path / "monitoring", targets=targets, interval="1s")
    with prometheus(settings, tmp_path / "prometheus") as running:
        yield running


def workers_seen(server: Prometheus) -> set[str]:
    found = server.query("count by (worker) (reknit_worker_steps_total)")
    return {dict(labels)["worker"] for labels in found}


def expression(title: str) -> str:
    """That of the panel's first series, as it is asked."""
    (panel,) = [each for each in TRAINING.panels if each.title == title]
    return asked(panel.series[0].expr)


def is_positive(server: Prometheus, title: str) -> bool:
    return max(server.query(expression(title)).values(), default=0.0) > 0


def test_every_panel_has_data_of_a_run_that_lost_a_worker(
    tmp_path: Path, targets: Path, server: Prometheus
) -> None:
    recipe = toy_recipe(
        "watched",
        100_000,
        4,
        2,
        data={
            "build": "tests.support.ray_jobs:build_paced_tokens",
            "arguments": {"seconds": 0.005},
            "held_out_every": 5,
            "held_out_micro_batches": 2,
        },
        checkpoint={"every": 20, "keep": 2},
        # nobody knows what a CPU can do, so the recipe says it
        metrics={"targets": str(targets), "peak_flops": 1e9},
    )
    folder = tmp_path / "watched"
    RunFolder.create(folder, recipe.to_toml(), {})
    job = assemble(recipe, str(folder / "checkpoints"))
    with (
        connect(None, 4, 0.25, 0),
        RayRun(job, run_settings(recipe, folder)) as run,
    ):
        wait_until(lambda: len(workers_seen(server)) == 4, "Prometheus finds the run and all its workers")
        os.kill(run.processes()[VICTIM], signal.SIGKILL)
        wait_until(lambda: any(isinstance(e, Recovered) for e in run.progress(0, 0).events), "the recovery")
        server.wait_for_data(TRAINING, run="watched")
        for mark in TRAINING.marks:
            wait_until(partial(server.query, asked(mark.expr, window="1m")), mark.name)

        wait_until(lambda: workers_seen(server) == {"0", "1", "2"}, "the series of who is gone have ended")
        wait_until(lambda: server.value('reknit_workers{run="watched"}') == 3, "three workers are left")
        assert server.value("reknit_recoveries_total") == 1
        for title in ("Samples", "Model FLOPs utilisation (MFU)", "Data wait", "Pipeline bubble"):
            wait_until(partial(is_positive, server, title), title)
        shares = wait_until(partial(server.query, expression("Where the workers' time goes")), "shares")
        assert {dict(labels)["part"] for labels in shares} == set(PARTS)
        assert sum(shares.values()) == pytest.approx(1.0)

        rules = httpx.get(f"{server.url}/api/v1/rules", timeout=30).json()["data"]["groups"][0]["rules"]
        assert {rule["name"]: rule["health"] for rule in rules} == {alert.name: "ok" for alert in ALERTS}
        assert server.query('ALERTS{alertstate="firing"}') == {}
        run.stop()
        wait_until(lambda: run.wait(0.05), "the end")
        run.finish()
    assert list(targets.iterdir()) == [], "nobody looks for a run that has ended"
    wait_until(lambda: not server.query("reknit_step"), "Prometheus knows that it has ended")
