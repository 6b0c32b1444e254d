"""Runs as jobs of a real Ray head: two side by side, asked, followed, stopped, resumed, by the commands
alone.

The tests follow the two runs from submission to end, one after the other.
"""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from actors.crew import LEFT_NODE
from actors.jobs import Jobs
from jobs.cli import app
from jobs.control import drain, found
from jobs.recipe.recipe import load_recipe
from jobs.submission import watch
from runtime.checkpoint import list_checkpoints
from runtime.events import Resized, WorkerLeft
from runtime.run_folder import RunFolder
from tests.support.dashboard import Head, Wire, dashboard_cluster
from tests.support.ray_jobs import PACED, recipe_bits, toy_recipe, wait_until

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

    def events(self, run: str, kind: type[Any]) -> list[Any]:
        return [
            logged.event for logged in self.folder(run).read_events().events if isinstance(logged.event, kind)
        ]

    def goes_on(self, run: str, steps: int = 3) -> None:
        reached = self.steps(run) + steps
        try:
            wait_until(lambda: self.steps(run) >= reached, f"step {reached} of {run}")
        except AssertionError as error:
            raise AssertionError(f"{error}; its log:\n{self.reknit('logs', run).output}") from None

    def members(self, run: str) -> tuple[int, ...]:
        with found(self.folder(run)) as way:
            plan = way.plan()
        return plan.workers if plan else ()

    def nodes(self, run: str) -> dict[int, str]:
        """Those with work, and their nodes."""
        with found(self.folder(run)) as way:
            domains, plan = way.domains(), way.plan()
        return {worker: domains[worker] for worker in (plan.workers if plan else ()) if worker in domains}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    base = tmp_path_factory.mktemp("site")
    work = base / "work"
    work.mkdir()
    recipe = toy_recipe(
        "toy",
        1_000_000,
        1,
        1,
        data=PACED,
        parallel={
            "workers": 1,
            "max_workers": 2,
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
    with dashboard_cluster(2, 2) as head, Wire(head.url) as wire:
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


def test_a_run_is_resized_and_the_other_one_does_not_notice(site: Site) -> None:
    wait_until(lambda: len(site.members("b")) == 2, "max_workers of b")
    assert site.reknit("resize", "a", "1").output.startswith("a is to have 1 worker")
    assert site.events("a", Resized)[-1].workers == 1 and not site.events("b", Resized)
    wait_until(lambda: len(site.members("a")) == 1, "one worker")
    assert len(site.members("b")) == 2
    refused = site.reknit("resize", "a", "3")
    assert refused.exit_code == 2
    assert "because parallel.max_workers is 2: name a number from 1 to 2\n" in refused.output
    assert refused.output.startswith("reknit: the run cannot have 3 workers")


def test_a_drained_node_is_left_and_not_taken_again(site: Site) -> None:
    node = next(iter(site.nodes("b").values()))
    going = {worker for worker, where in site.nodes("b").items() if where == node}
    with pytest.raises(ValueError, match="neither a worker's number nor a Ray node's id"):
        drain(site.runs / "b", "node-1")
    with pytest.raises(
        ValueError, match="no worker of the run is on a node with an id that begins with 00000"
    ):
        drain(site.runs / "b", "00000000ffff")
    assert set(drain(site.runs / "b", node[:16])) == going

    def moved() -> bool:
        nodes = site.nodes("b")
        return len(nodes) == 2 and not going & set(nodes)

    wait_until(moved, "others in their place")
    assert node not in site.nodes("b").values()
    left = {event.worker: event.reason for event in site.events("b", WorkerLeft)}
    assert {left[worker] for worker in going} == {LEFT_NODE}


def test_a_stop_writes_a_checkpoint_and_the_other_run_goes_on(site: Site) -> None:
    stopped = site.reknit("stop", "a")
    assert stopped.exit_code == 0, stopped.output
    assert "stopping at the next step boundary, with a checkpoint" in stopped.output
    last = site.steps("a")
    assert list_checkpoints(site.folder("a").checkpoints)[-1] == last
    assert site.reknit("status", "a").exit_code == 130
    assert site.reknit("stop", "a").exit_code == 0, "there is nothing left to stop"
    refused = site.reknit("resize", "a", "3")
    assert refused.exit_code == 2 and "has ended (STOPPED)" in refused.output
    site.goes_on("b")


def test_a_stopped_run_goes_on_as_another_job_with_the_same_bits(site: Site) -> None:
    steps = site.steps("a") + 5
    sets = ["--set", f"run.steps={steps}", "--set", "parallel.max_workers=1"]
    shown = site.submit("a-2", "--resume", "a", *sets)
    assert shown.exit_code == 0, shown.output
    assert "started from the checkpoint of step" in shown.output and "completed with" in shown.output
    recipe = load_recipe(site.folder("a").recipe)
    records = site.folder("a").read_steps().steps
    assert [(s.loss, s.grad_norm, s.fingerprint) for s in records] == recipe_bits(recipe)


def test_an_entry_points_mistake_is_told_by_the_exit_code(site: Site) -> None:
    failed = site.submit("c", "--entrypoint", "echo no; exit 2")
    assert failed.exit_code == 2 and failed.output.endswith("c: FAILED\n")
    assert "\nno\n" in failed.output


def test_what_was_followed_is_the_log(site: Site) -> None:
    assert site.reknit("stop", "b", "--no-wait").exit_code == 0
    assert site.follower is not None
    site.follower.join(60.0)
    assert not site.follower.is_alive()
    assert "".join(site.followed) == site.reknit("logs", "b").output
    assert site.reknit("logs", "-f", "b").exit_code == 130
