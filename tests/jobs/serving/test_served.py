"""Serving on a real Ray Serve: load, a replica killed in mid-answer, new checkpoints, overload."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from torch import nn

from jobs.dashboards.serving import SERVING
from jobs.monitoring import monitoring
from jobs.recipe.recipe import Recipe
from jobs.serving.generation import Sampling
from tests.support.prometheus import asked, needs_prometheus, prometheus
from tests.support.ray_jobs import TOKEN, descendants, wait_until
from tests.support.served import CONTEXT, expected_text, make_run, write_checkpoint

pytestmark = pytest.mark.ray

BEARER = "not-a-secret"
CONCURRENT, QUEUED = 32, 4
"""Of a replica, and of the command below."""


@dataclass
class Served:
    folder: Path
    recipe: Recipe
    url: str
    layers: dict[int, list[nn.Module]]

    def checkpoint(self, version: int) -> None:
        self.layers[version] = write_checkpoint(self.folder, self.recipe, version, version)

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=200)
        return httpx.AsyncClient(base_url=self.url, timeout=90, limits=limits, headers=self.headers)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {BEARER}"}

    def metric(self, name: str) -> dict[str, float]:
        """A metric's value by the values of its labels beside the run's, "" for none."""
        text = httpx.get(f"{self.url}/metrics", headers=self.headers, timeout=30).text
        pattern = re.compile(rf"^reknit_serve_{name}{{(.*)}} (\S+)$", re.MULTILINE)
        return {
            ",".join(
                value for label, value in re.findall(r'(\w+)="([^"]*)"', labels) if label != "run"
            ): float(number)
            for labels, number in pattern.findall(text)
        }


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The command as a person starts it. At the end Ctrl-C must end it, and all that came from it."""
    folder = tmp_path_factory.mktemp("served") / "run"
    recipe = make_run(folder)
    layers = {10: write_checkpoint(folder, recipe, 10, 10)}
    token = uuid.uuid4().hex
    command = [sys.executable, "-m", "jobs.cli", "serve", str(folder), "--port", "0"]
    command += ["--replicas", "2", "2", "--queue", str(QUEUED)]
    environment = {**os.environ, TOKEN: token, "REKNIT_SERVE_TOKEN": BEARER}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://127.0.0.1:\d+", line)
        assert found, line
        yield Served(folder, recipe, found[0], layers)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "stopping\n"
        assert process.wait(60) == 0
        wait_until(lambda: not descendants(token), "all processes of the command to end")
    finally:
        process.kill()
        for each in descendants(token):
            os.kill(each, signal.SIGKILL)


@dataclass
class Told:
    text: str
    versions: set[int]
    finish: str


def body(number: int, most: int, **other: Any) -> dict[str, Any]:
    sampled = {"temperature": 0.7, "top_p": 0.8, "seed": number} if number % 2 else {}
    return {"prompt": f"{number} " * (1 + number % 9), "max_tokens": most, **sampled, **other}


def wanted(served: Served, version: int, number: int, most: int) -> str:
    sampling = Sampling(0.7, 0.8, number) if number % 2 else Sampling()
    return expected_text(served.layers[version], body(number, most)["prompt"], most, sampling)


async def streamed(
    client: httpx.AsyncClient, number: int, most: int, begun: asyncio.Event | None = None
) -> Told:
    text, versions, finish = "", set(), ""
    async with client.stream("POST", "/v1/completions", json=body(number, most, stream=True)) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            text += event["choices"][0]["text"]
            versions.add(event["checkpoint"])
            finish = event["choices"][0]["finish_reason"] or finish
            if begun is not None:
                begun.set()
    return Told(text, versions, finish)


async def whole(client: httpx.AsyncClient, number: int, most: int) -> Told:
    response = await client.post("/v1/completions", json=body(number, most))
    assert response.status_code == 200, response.text
    answer = response.json()
    return Told(answer["choices"][0]["text"], {answer["checkpoint"]}, answer["choices"][0]["finish_reason"])


def test_answers_under_load_are_those_of_an_engine_alone(served: Served) -> None:
    async def load() -> list[Told]:
        places = asyncio.Semaphore(12)
        async with served.client() as client:

            async def one(number: int) -> Told:
                async with places:
                    ask = streamed if number % 3 else whole
                    return await ask(client, number, 5 + number)

            return await asyncio.gather(*(one(number) for number in range(40)))

    told = asyncio.run(load())
    assert [each.text for each in told] == [wanted(served, 10, number, 5 + number) for number in range(40)]
    assert {each.finish for each in told} == {"length"}


def busy_process(served: Served) -> int | None:
    """The replica with the most answers under way, if it has some."""
    running = served.metric("replica_running")
    return next((int(process) for process in running if running[process] == max(running.values()) >= 2), None)


def test_a_replica_killed_in_mid_answer_costs_no_request(served: Served) -> None:
    """Every stream has begun, and whole answers are under way, when one of two processes is killed."""
    numbers, most = range(6), CONTEXT - 40

    async def load() -> list[Told]:
        async with served.client() as client:
            begun = [asyncio.Event() for _ in numbers]
            streams = [
                asyncio.create_task(streamed(client, number, most, event))
                for number, event in zip(numbers, begun, strict=True)
            ]
            others: list[Awaitable[Told]] = [
                asyncio.create_task(whole(client, 100 + number, most)) for number in range(2)
            ]
            await asyncio.gather(*(event.wait() for event in begun))
            busiest = await asyncio.to_thread(
                wait_until, lambda: busy_process(served), "a replica with several answers under way"
            )
            os.kill(busiest, signal.SIGKILL)
            return await asyncio.gather(*streams, *others)

    told = asyncio.run(load())
    numbers_asked = [*numbers, 100, 101]
    assert [each.text for each in told] == [wanted(served, 10, number, most) for number in numbers_asked]
    assert {each.finish for each in told} == {"length"}
    assert served.metric("continued")[""] >= 2
    statuses = {labels.split(",")[-1] for labels in served.metric("requests_total")}
    assert "200" in statuses and not {"429", "503"} & statuses
    wait_until(lambda: served.metric("replicas")[""] == 2, "a new replica in the place of the killed one")


@needs_prometheus
def test_every_panel_has_data_of_a_service(served: Served, tmp_path: Path) -> None:
    """A real Prometheus finds the service by its file, bears the token, and is asked for every expression."""
    token = tmp_path / "token"
    token.write_text(BEARER)
    settings = monitoring(tmp_path / "monitoring", interval="1s", token=token)

    def ask() -> None:
        response = httpx.post(
            f"{served.url}/v1/completions", json=body(1, 20), headers=served.headers, timeout=60
        )
        assert response.status_code == 200, response.text

    with prometheus(settings, tmp_path / "prometheus") as server:
        server.wait_for_data(SERVING, run="run", meanwhile=ask)
        assert server.value("reknit_serve_replicas") == 2
        (latency,) = [panel for panel in SERVING.panels if panel.title == "Answer latency"]
        median, *_ = latency.series
        assert 0 < max(server.query(asked(median.expr)).values()) < 60


def test_a_new_checkpoint_is_taken_over_while_answers_go_on(served: Served) -> None:
    numbers, most = range(3), CONTEXT - 40

    async def load() -> tuple[list[Told], list[Told]]:
        async with served.client() as client:
            begun = [asyncio.Event() for _ in numbers]
            streams = [
                asyncio.create_task(streamed(client, number, most, event))
                for number, event in zip(numbers, begun, strict=True)
            ]
            await asyncio.gather(*(event.wait() for event in begun))
            await asyncio.to_thread(served.checkpoint, 20)
            later = []
            while {20} not in [each.versions for each in later[-4:]] or len(later) < 4:
                later += await asyncio.gather(*(whole(client, 50 + n, 20) for n in range(4)))
            return await asyncio.gather(*streams), later

    before, after = asyncio.run(load())
    assert [each.versions for each in before] == [{10}] * len(numbers)
    assert [each.text for each in before] == [wanted(served, 10, number, most) for number in numbers]
    for place, each in enumerate(after):
        (version,) = each.versions
        assert each.text == wanted(served, version, 50 + place % 4, 20)
    wait_until(
        lambda: (
            set(served.metric("replica_version").values()) == {20}
            and set(served.metric("replica_versions").values()) == {1}
        ),
        "all replicas to let go of the old checkpoint",
    )


def test_overload_is_refused_at_once_and_the_others_are_answered(served: Served) -> None:
    count, most = 100, 60

    async def load() -> list[httpx.Response]:
        async with served.client() as client:
            asked = [client.post("/v1/completions", json=body(number, most)) for number in range(count)]
            return await asyncio.gather(*asked)

    responses = asyncio.run(load())
    version = max(served.layers)
    answered = 0
    for number, response in enumerate(responses):
        if response.status_code == 200:
            answered += 1
            text = response.json()["choices"][0]["text"]
            assert number % 5 or text == wanted(served, version, number, most)
        else:
            assert response.status_code == 429, response.text
            assert response.headers["retry-after"] == "1"
            assert "try again later" in response.json()["error"]["message"]
    assert 2 * CONCURRENT + QUEUED <= answered < count


def test_clients_that_go_away_leave_nothing_behind(served: Served) -> None:
    async def leave() -> None:
        async with served.client() as client:
            asked = body(1, CONTEXT - 40, stream=True)
            async with client.stream("POST", "/v1/completions", json=asked) as response:
                await anext(response.aiter_lines())

    before = sum(served.metric("replica_tokens").values())
    asyncio.run(leave())
    wait_until(lambda: not any(served.metric("replica_running").values()), "the sequence to be dropped")
    assert sum(served.metric("replica_tokens").values()) < before + CONTEXT - 40


def test_mistakes_and_strangers_are_refused_there_too(served: Served) -> None:
    headers = served.headers
    refused = httpx.post(f"{served.url}/v1/completions", json={"prompt": "a"})
    assert refused.status_code == 401
    wrong = httpx.post(
        f"{served.url}/v1/completions", json={"prompt": "a", "max_tokens": -1}, headers=headers
    )
    assert wrong.status_code == 400 and "max_tokens" in wrong.json()["error"]["message"]
    large = httpx.post(
        f"{served.url}/v1/completions",
        content=b"x" * (17 << 20),
        headers={**headers, "content-type": "application/json"},
    )
    assert large.status_code == 413
    health = httpx.get(f"{served.url}/healthz").json()
    assert (health["status"], health["replicas"]) == ("ok", 2)
