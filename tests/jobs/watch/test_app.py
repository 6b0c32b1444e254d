"""The page's HTTP interface: what it says, to whom, and what it lets a browser do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from plotly.offline import get_plotlyjs

from jobs.watch.app import FRESH_SECONDS, Shown, build, is_own_host
from runtime.run_folder import RunFolder
from runtime.spans import KINDS
from tests.support.made_run import LOST_AT, STEPS, make_run


class Asked:
    """Requests to the page, as a browser on this machine sends them."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def __call__(
        self, path: str, method: str = "GET", host: str = "127.0.0.1:8270", **headers: str
    ) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8270") as client:
                return await client.request(method, path, headers={"host": host, **headers})

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return Asked(build(make_run(tmp_path_factory.mktemp("runs"))))


def test_the_run(ask: Asked) -> None:
    body = ask("/api/run").json()
    assert (body["run"]["name"], body["run"]["state"], body["run"]["step"]) == ("made", "completed", STEPS)
    assert body["plan"]["generation"] == 3 and body["plans"] == [1, 2, 3]
    assert body["charts"]["loss"]["x"] == list(range(1, STEPS + 1))
    assert body["charts"]["held_out"]["x"] == [20, 40, 60]
    assert [event["kind"] for event in body["events"]][-1] == "RunFinished"


def test_timeline_and_plans(ask: Asked) -> None:
    body = ask("/api/timeline").json()
    assert body["kinds"] == list(KINDS)
    recovery = KINDS.index("recovery")
    steps = {line["step"]: line["workers"] for line in body["steps"]}
    assert recovery in steps[LOST_AT]["0"][::4] and recovery not in steps[LOST_AT - 1]["0"][::4]
    assert "5" in ask("/api/plan/1").json()["shards"] and "5" not in ask("/api/plan/2").json()["shards"]
    assert ask("/api/plan/9").status_code == 404 and ask("/api/plan/x").status_code == 404


def test_what_is_known_is_not_sent_again(ask: Asked) -> None:
    for path in ("/api/run", "/api/timeline", "/plotly.js", "/page.js"):
        tag = ask(path).headers["etag"]
        again = ask(path, **{"if-none-match": tag})
        assert again.status_code == 304 and again.content == b""


def test_what_is_known_of_another_run_is_not_taken_for_this_ones(ask: Asked, tmp_path: Path) -> None:
    another = Asked(build(make_run(tmp_path)))  # after which a server of this run listens at the same port
    for path in ("/api/run", "/api/timeline"):
        answer = ask(path, **{"if-none-match": another(path).headers["etag"]})
        assert answer.status_code == 200 and answer.content
    assert ask("/api/run").json()["server"] != another("/api/run").json()["server"]


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=10, finished=False)
    now = [1000.0]
    shown = Shown(folder, clock=lambda: now[0])
    tag, body = shown.run()
    assert body["run"]["step"] == 10
    folder.supersede_steps(9)
    assert shown.run()[0] == tag, "read a moment ago"
    now[0] += 2 * FRESH_SECONDS
    assert shown.run()[1]["run"]["step"] == 8 and shown.run()[0] != tag


def test_a_record_that_cannot_be_read_for_a_while(tmp_path: Path) -> None:
    class Away:
        name = "away"
        reachable = True

        def __init__(self, folder: RunFolder) -> None:
            self._folder = folder

        def piece(self, name: str, offset: int) -> bytes | None:
            if not self.reachable:
                raise ConnectionError("the controller does not answer")
            return self._folder.piece(name, offset)

    source = Away(make_run(tmp_path, steps=5, finished=False))
    now = [0.0]
    shown = Shown(source, clock=lambda: now[0])
    assert shown.run()[1]["run"]["problem"] == ""
    source.reachable = False
    now[0] += 1
    body = shown.run()[1]
    assert body["run"]["problem"] == "the controller does not answer" and body["run"]["step"] == 5
    source.reachable = True
    now[0] += 1
    assert shown.run()[1]["run"]["problem"] == ""


def test_plotly_is_that_of_its_package(ask: Asked) -> None:
    assert ask("/plotly.js").text == get_plotlyjs()


@pytest.mark.parametrize("path", ["/", "/api/run", "/page.css", "/nothing"])
def test_every_answer_binds_the_browser(ask: Asked, path: str) -> None:
    headers = ask(path).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in headers


def test_nothing_of_the_page_comes_from_elsewhere_or_runs_inline(ask: Asked) -> None:
    page = ask("/").text
    assert "http://" not in page and "https://" not in page and " on" not in page.replace(" one", "")
    assert page.count("<script") == page.count("<script src=")
    for path in ("/page.js", "/grid.js", "/timeline.js", "/lanes.js", "/charts.js", "/words.js"):
        script = ask(path).text
        assert "innerHTML" not in script and "insertAdjacentHTML" not in script and "://" not in script


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_it_only_reads(ask: Asked, method: str) -> None:
    assert ask("/api/run", method).status_code == 405


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1:8270", True),
        ("localhost", True),
        ("LOCALHOST:8270", True),
        ("[::1]:8270", True),
        ("10.0.0.7:80", True),
        ("head.cluster:8270", True),
        ("evil.example", False),
        ("evil.example:8270", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:8270", False),
        ("", False),
    ],
)
def test_whose_name_is_this(host: str, own: bool) -> None:
    assert is_own_host(host, ["head.cluster"]) is own


def test_a_name_that_was_bent_to_this_machine_is_refused(ask: Asked) -> None:
    refused = ask("/api/run", host="evil.example:8270")
    assert refused.status_code == 421 and "made" not in refused.text
    assert ask("/", host="evil.example").status_code == 421
