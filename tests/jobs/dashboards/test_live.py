"""Every expression of the training dashboard, asked of a real Prometheus that scrapes a real run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
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
            wait_until(lambda e=mark.expr: server.query(asked(e, window="1m")), mark.name)  # type: ignore[misc]

        assert workers_seen(server) == {"0", "1", "2"}, "the series of who is gone have ended"
        assert server.value('reknit_workers{run="watched"}') == 3
        assert server.value("reknit_recoveries_total") == 1
        for panel in ("Samples", "Model FLOPs utilisation (MFU)", "Where the workers' time goes"):
            (found,) = [each for each in TRAINING.panels if each.title == panel]
            assert max(server.query(asked(found.series[0].expr)).values()) > 0, panel
        shares = [
            s.expr for p in TRAINING.panels if p.title == "Where the workers' time goes" for s in p.series
        ]
        assert sum(server.query(asked(shares[0])).values()) == pytest.approx(1.0)

        rules = httpx.get(f"{server.url}/api/v1/rules", timeout=30).json()["data"]["groups"][0]["rules"]
        assert {rule["name"]: rule["health"] for rule in rules} == {alert.name: "ok" for alert in ALERTS}
        assert server.query("ALERTS") == {}
        run.stop()
        wait_until(lambda: run.wait(0.05), "the end")
        run.finish()
    assert list(targets.iterdir()) == [], "nobody looks for a run that has ended"
    wait_until(lambda: not server.query("reknit_step"), "Prometheus knows that it has ended")
