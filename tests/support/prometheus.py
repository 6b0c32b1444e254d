"""A real Prometheus: started, asked, ended."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from jobs.dashboards.panel import WINDOW, Dashboard
from tests.support.ray_jobs import wait_until

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="prometheus and promtool are not installed (Debian: apt-get install prometheus)",
)


def asked(expr: str, *, run: str = ".*", window: str = "10s") -> str:
    """The expression as Grafana sends it, with its variables filled in."""
    return expr.replace("$run", run).replace(WINDOW, window)


@dataclass
class Prometheus:
    url: str

    def query(self, expr: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The finite values now, by their labels. Fails if the expression cannot be evaluated."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=30)
        assert answer.status_code == 200, f"{expr}: {answer.text}"
        data = answer.json()["data"]
        assert data["resultType"] == "vector", expr
        found = {tuple(sorted(each["metric"].items())): float(each["value"][1]) for each in data["result"]}
        return {labels: value for labels, value in found.items() if math.isfinite(value)}

    def value(self, expr: str) -> float | None:
        """The one value, None where there is none (yet)."""
        found = self.query(expr)
        assert len(found) <= 1, found
        return next(iter(found.values()), None)

    def empty(self, dashboard: Dashboard, *, run: str = ".*") -> list[str]:
        """The series of a dashboard that have no data now: panel, and name of the series."""
        return [
            f"{panel.title}: {series.legend}: {series.expr}"
            for panel in dashboard.panels
            for series in panel.series
            if not self.query(asked(series.expr, run=run))
        ]

    def wait_for_data(
        self, dashboard: Dashboard, *, run: str, meanwhile: Callable[[], object] = lambda: None
    ) -> None:
        """Until every series of ``dashboard`` has some; ``meanwhile`` is called again and again."""
        missing: list[str] = []

        def all_there() -> bool:
            meanwhile()
            missing[:] = self.empty(dashboard, run=run)
            return not missing

        try:
            wait_until(all_there, "data in every panel", interval=0.5)
        except AssertionError:
            raise AssertionError(f"no data: {missing}") from None


@contextmanager
def prometheus(settings: Path, storage: Path) -> Iterator[Prometheus]:
    """Prometheus with ``settings``, at a free port of this machine, until the end of the block."""
    log = storage.with_suffix(".log")
    command = ["prometheus", f"--config.file={settings}", f"--storage.tsdb.path={storage}"]
    command += ["--web.listen-address=127.0.0.1:0", "--log.level=info"]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:

        def listening() -> str | None:
            assert process.poll() is None, log.read_text()
            found = re.search(r'msg="Listening on" address=(\S+)', log.read_text())
            return found and found[1]

        server = Prometheus(f"http://{wait_until(listening, 'Prometheus listens')}")

        def is_ready() -> bool:
            return httpx.get(f"{server.url}/-/ready", timeout=30).status_code == 200

        wait_until(is_ready, "Prometheus is ready")
        yield server
    finally:
        process.kill()  # its data is of no use any more
        process.wait(30)
