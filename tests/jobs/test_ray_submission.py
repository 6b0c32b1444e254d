"""Runs as jobs of a real Ray head: two side by side, listed, and followed, by the commands alone."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from actors.jobs import Jobs
from jobs.cli import app
from jobs.submission import watch
from runtime.run_folder import RunFolder
from tests.support.dashboard import Head, Wire, dashboard_cluster
from tests.support.ray_jobs import toy_recipe, wait_until

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Site:
    """Where the commands are given, and the log of run ``b`` as somebody follows it over a wire."""

    head: Head
    work: Path
    runs: Path
    wire: Wire
    followed: list[str] = field(default_factory=list)
    follower: threading.Thread | None = None

    def reknit(self, *words: str) -> Result:
        return CliRunner().invoke(app, [*words, "--address", self.head.url])

    def submit(self, run: str, *words: str) -> Result:
        # nodes on one machine unpack an upload into one folder, each anew: no two runs may have the same one
        work = self.work / run[0]
        places = ["--working-dir", str(work), "--runs", str(self.runs), "--env", f"PYTHONPATH={ROOT}"]
        return self.reknit("submit", str(work / "toy.toml"), "--id", run, *places, *words)

    def folder(self, run: str) -> RunFolder:
        return RunFolder(self.runs / run)

    def steps(self, run: str) -> int:
        return len(self.folder(run).read_steps().steps)

    def goes_on(self, run: str, steps: int = 3) -> None:
        reached = self.steps(run) + steps
        wait_until(lambda: self.steps(run) >= reached, f"step {reached} of {run}", interval=0.1)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    base = tmp_path_factory.mktemp("site")
    work = base / "work"
    work.mkdir()
    recipe = toy_recipe(
        "toy",
        1_000_000,
        2,
        1,
        data={"build": "tests.support.ray_jobs:build_paced_tokens", "arguments": {"seconds": 0.05}},
        parallel={
            "workers": 2,
            "max_workers": 3,
            "micro_batches": 5,
            "micro_batch_size": 2,
            "cpus_per_worker": 0.25,
        },
        metrics={"enabled": True},
    )
    for run in ("a", "b", "c"):
        (work / run).mkdir()
        (work / run / "toy.toml").write_text(recipe.to_toml())
        (work / run / "whose").write_text(run)
    with dashboard_cluster(3, 2) as head, Wire(head.url) as wire:
        site = Site(head, work, base / "runs", wire)
        for run in ("a", "b"):
            result = site.submit(run, "--no-wait")
            assert (result.exit_code, result.output) == (0, f"submitted: {run}\n")
        site.follower = threading.Thread(
            target=lambda: watch(Jobs(wire.url), "b", site.followed.append), daemon=True
        )
        site.follower.start()
        site.goes_on("a", 2)
        site.goes_on("b", 2)
        yield site


def test_two_runs_have_nothing_in_common(site: Site) -> None:
    facts = {run: site.folder(run).controller_facts() for run in ("a", "b")}
    assert facts["a"]["name"] != facts["b"]["name"]
    assert facts["a"]["metrics_port"] != facts["b"]["metrics_port"]
    for run in ("a", "b"):
        page = (
            urllib.request.urlopen(f"http://127.0.0.1:{facts[run]['metrics_port']}/metrics").read().decode()
        )
        assert f'reknit_step{{run="{run}"}}' in page
        assert f'run="{"b" if run == "a" else "a"}"' not in page
    listed = json.loads(site.reknit("list", "--json").output)
    assert [(run["run"], run["status"]) for run in listed] == [("a", "RUNNING"), ("b", "RUNNING")]
    told = site.reknit("status", "a")
    assert told.exit_code == 3 and "RUNNING" in told.output


def test_the_same_id_starts_nothing_and_another_recipe_is_refused(site: Site) -> None:
    assert site.submit("a", "--no-wait").output == "submitted before: a\n"
    refused = site.submit("a", "--no-wait", "--set", "run.seed=8")
    assert refused.exit_code == 2 and "another recipe or command" in refused.output
    assert len(json.loads(site.reknit("list", "--json").output)) == 2


def test_the_log_is_followed_across_a_cut(site: Site) -> None:
    wait_until(lambda: "b started from" in "".join(site.followed), "the log of b")
    before = site.wire.connections
    site.wire.cut()
    wait_until(lambda: site.wire.connections > before, "another connection")
