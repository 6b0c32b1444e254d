"""The HTTP interface over an engine in this process: answers, streams, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from actors.serving import Overloaded, Unavailable
from jobs.serving.app import AppSettings, build
from jobs.serving.generation import Sampling
from jobs.serving.service import Service
from tests.support.answering import Client, Local, answering, events
from tests.support.served import CONTEXT, expected_text, layers_of, make_run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    with answering(tmp_path_factory.mktemp("text") / "run") as local:
        yield local


@pytest.fixture
def ask(text: Local) -> Client:
    return Client(build(Service("story", "completions", CONTEXT), AppSettings(most_bytes=5000), text))


def test_a_completion_is_the_models(ask: Client) -> None:
    answer = ask("POST", "/v1/completions", json={"prompt": "once", "max_tokens": 40}).json()
    layers = layers_of(make_recipe(), 1)
    assert answer["choices"][0]["text"] == expected_text(layers, "once", 40)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 40, "total_tokens": 44}
    assert (answer["object"], answer["model"], answer["checkpoint"]) == ("text_completion", "story", 10)


def make_recipe() -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return make_run(Path(folder) / "run")


def test_a_stream_says_the_same_in_parts(ask: Client) -> None:
    body = {"prompt": "once", "max_tokens": 40, "temperature": 0.8, "top_p": 0.9, "seed": 5}
    whole = ask("POST", "/v1/completions", json=body).json()
    assert whole["choices"][0]["text"] == expected_text(
        layers_of(make_recipe(), 1), "once", 40, Sampling(0.8, 0.9, 5)
    )
    response = ask("POST", "/v1/completions", json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = events(response)
    assert "".join(part["choices"][0]["text"] for part in parts) == whole["choices"][0]["text"]
    assert [part["choices"][0]["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1]["choices"][0]["finish_reason"] == "length" and parts[-1]["usage"] == whole["usage"]
    assert len(parts) > 10


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_answer(ask: Client, text: Local, stream: bool) -> None:
    free = expected_text(layers_of(make_recipe(), 1), "once", 60)
    stop = free[20:23]
    body = {"prompt": "once", "max_tokens": 400, "stop": ["never-there", stop], "stream": stream}
    response = ask("POST", "/v1/completions", json=body)
    if stream:
        parts = events(response)
        shown, last = "".join(part["choices"][0]["text"] for part in parts), parts[-1]
    else:
        last = response.json()
        shown = last["choices"][0]["text"]
    assert shown == free[: free.index(stop)]
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["usage"]["completion_tokens"] == free.index(stop) + 3


def test_seeds_decide_and_are_drawn_where_none_is_given(ask: Client, text: Local) -> None:
    body = {"prompt": "a", "max_tokens": 30, "temperature": 1.5}
    texts = [ask("POST", "/v1/completions", json={**body, "seed": seed}).json() for seed in (1, 1, 2)]
    shown = [answer["choices"][0]["text"] for answer in texts]
    assert shown[0] == shown[1] != shown[2]
    for _ in range(2):
        ask("POST", "/v1/completions", json=body)
    assert text.asked[-1].sampling.seed != text.asked[-2].sampling.seed


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ({"content": b"{", "type": "application/json"}, 400, "the body is no JSON"),
        ({"content": b"\xff\xfe", "type": "application/json"}, 400, "the body is no JSON"),
        ({"content": b"[" * 4000, "type": "application/json"}, 400, "the body is no JSON"),
        ({"json": [1]}, 400, "no JSON object"),
        ({"content": b"prompt=x", "type": "application/x-www-form-urlencoded"}, 415, "application/json"),
        ({"content": b"{}", "type": ""}, 415, "Content-Type is missing"),
        ({"json": {}}, 400, "the field prompt is missing"),
        ({"json": {"prompt": ""}}, 400, "prompt is not as it should be"),
        ({"json": {"prompt": 5}}, 400, "prompt is not as it should be"),
        ({"json": {"prompt": ["a"]}}, 400, "prompt is not as it should be"),
        ({"json": {"prompt": "a", "max_tokens": -1}}, 400, "max_tokens is not as it should be"),
        ({"json": {"prompt": "a", "max_tokens": 0}}, 400, "greater than or equal to 1"),
        ({"json": {"prompt": "a", "max_tokens": 1.5}}, 400, "max_tokens is not as it should be"),
        ({"json": {"prompt": "a", "max_tokens": "9"}}, 400, "max_tokens is not as it should be"),
        ({"json": {"prompt": "a", "max_tokens": True}}, 400, "max_tokens is not as it should be"),
        ({"json": {"prompt": "a", "max_tokens": 512}}, 400, "lower max_tokens or shorten the prompt"),
        ({"json": {"prompt": "a" * 600}}, 400, "leaves no room for an answer"),
        ({"json": {"prompt": "a", "temperature": -0.1}}, 400, "temperature is not as it should be"),
        ({"content": b'{"prompt": "a", "temperature": NaN}', "type": "application/json"}, 400, "temperature"),
        ({"json": {"prompt": "a", "top_p": 0}}, 400, "top_p is not as it should be"),
        ({"json": {"prompt": "a", "seed": "x"}}, 400, "seed is not as it should be"),
        ({"json": {"prompt": "a", "seed": 2**70}}, 400, "seed is not as it should be"),
        ({"json": {"prompt": "a", "stop": ""}}, 400, "stop is not as it should be"),
        ({"json": {"prompt": "a", "stop": ["x"] * 9}}, 400, "stop is not as it should be"),
        ({"json": {"prompt": "a", "stream": "yes"}}, 400, "stream is not as it should be"),
        ({"json": {"prompt": "a", "n": 2}}, 400, "the field n is not known: choose from"),
        ({"content": b'{"\\ud800": 1}', "type": "application/json"}, 400, r"the field \ud800 is not known"),
        (
            {"content": b'{"prompt": "\\ud800"}', "type": "application/json"},
            400,
            "prompt is not as it should be",
        ),
        ({"json": {"prompt": "a", "model": "gpt-9"}}, 404, "there is no model gpt-9 here: it is story"),
        ({"content": b"x" * 6000, "type": "application/json"}, 413, "larger than 5,000 bytes"),
    ],
)
def test_bad_completions_get_one_sentence(
    ask: Client, text: Local, arguments: dict[str, Any], status: int, message: str
) -> None:
    before = len(text.asked)
    kind = arguments.pop("type", None)
    if kind is not None:
        arguments["headers"] = {"content-type": kind} if kind else {}
    response = ask("POST", "/v1/completions", **arguments)
    assert response.status_code == status
    said = response.json()["error"]["message"]
    assert message in said and "\n" not in said
    assert len(text.asked) == before


def test_a_body_without_a_length_is_cut_off_too(ask: Client) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1000

    response = ask("POST", "/v1/completions", content=endless(), headers={"content-type": "application/json"})
    assert response.status_code == 413


def test_other_routes_and_methods(ask: Client) -> None:
    assert ask("GET", "/nowhere").status_code == 404
    assert ask("GET", "/v1/completions").status_code == 405
    assert "ask for POST /v1/completions" in ask("POST", "/v1/caption").json()["error"]["message"]
    assert ask("GET", "/v1/models").json()["data"][0]["id"] == "story"
    assert ask("GET", "/healthz").json() == {
        "status": "ok",
        "run": "story",
        "replicas": 1,
        "checkpoints": [10],
    }
    page = ask("GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_metrics_count(ask: Client) -> None:
    ask("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 9})
    ask("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 8, "stream": True})
    ask("POST", "/v1/completions", json={"prompt": ""})
    lines = ask("GET", "/metrics").text.splitlines()
    for line in (
        'reknit_serve_requests_total{route="/v1/completions",run="story",status="200"} 2.0',
        'reknit_serve_requests_total{route="/v1/completions",run="story",status="400"} 1.0',
        'reknit_serve_tokens_total{run="story"} 17.0',
        'reknit_serve_under_way{run="story"} 1.0',  # this one
        'reknit_serve_continued{run="story"} 3.0',
        'reknit_serve_replica_version{process="7",run="story"} 10.0',
        'reknit_serve_replicas{run="story"} 1.0',
    ):
        assert line in lines


def test_what_fails_is_counted_and_over(ask: Client, text: Local) -> None:
    text.fails, text.after = RuntimeError("a mistake of ours"), 0
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        ask("POST", "/v1/completions", json={"prompt": "a"})
    ask("POST", "/v1/completions", content=b'{"\\ud800": 1}', headers={"content-type": "application/json"})
    lines = ask("GET", "/metrics").text.splitlines()
    for line in (
        'reknit_serve_requests_total{route="/v1/completions",run="story",status="500"} 1.0',
        'reknit_serve_requests_total{route="/v1/completions",run="story",status="400"} 1.0',
        'reknit_serve_under_way{run="story"} 1.0',  # this one
    ):
        assert line in lines


@pytest.mark.parametrize("sent", [0, 1, 2])
def test_a_client_that_goes_away_is_no_longer_under_way(text: Local, sent: int) -> None:
    """It is gone after ``sent`` messages of a stream: its head and its events."""
    app = build(Service("story", "completions", CONTEXT), AppSettings(), text)
    said: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"prompt": "once", "stream": true}'}

    async def send(message: Any) -> None:
        if len(said) == sent:
            raise OSError("the connection is closed")
        said.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    with pytest.raises(ClientDisconnect):
        asyncio.run(app(scope, receive, send))
    lines = Client(app)("GET", "/metrics").text.splitlines()
    assert 'reknit_serve_under_way{run="story"} 1.0' in lines  # this one
    assert sum(line.startswith("reknit_serve_requests_total") for line in lines) == 1
    assert text.admitted_now == 0


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Basic secret", "secret", "Bearer s\u00e9cret"]
)
def test_without_the_token_nothing_is_answered(text: Local, header: str | None) -> None:
    ask = Client(build(Service("story", "completions", CONTEXT), AppSettings(token="secret"), text))
    headers = {} if header is None else {"authorization": header.encode()}
    for method, path in (("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/v1/models")):
        response = ask(method, path, headers=headers)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert ask("GET", "/healthz").status_code == ask("GET", "/").status_code == 200
    right = {"authorization": "bearer secret"}
    assert ask("GET", "/v1/models", headers=right).status_code == 200


def test_overload_says_when_to_try_again(ask: Client, text: Local) -> None:
    text.full = Overloaded(4)
    try:
        for stream in (False, True):
            response = ask("POST", "/v1/completions", json={"prompt": "a", "stream": stream})
            assert response.status_code == 429 and response.headers["retry-after"] == "4"
    finally:
        text.full = None
    for stream in (False, True):
        text.fails, text.after = Unavailable("all dead"), 0
        response = ask("POST", "/v1/completions", json={"prompt": "a", "stream": stream})
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
    assert text.admitted_now == 0


def test_who_finds_no_place_is_refused_before_the_body_is_read(ask: Client, text: Local) -> None:
    read: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        for part in (b'{"prompt": ', b'"a"}'):
            read.append(part)
            yield part

    def answer() -> int:
        headers = {"content-type": "application/json"}
        return ask("POST", "/v1/completions", content=body(), headers=headers).status_code

    text.full = Overloaded(4)
    try:
        assert (answer(), read) == (429, [])
    finally:
        text.full = None
    assert (answer(), len(read), text.admitted_now) == (200, 2, 0)


def test_a_body_that_does_not_come_gives_its_place_back(text: Local) -> None:
    settings = AppSettings(body_seconds=0.05)
    ask = Client(build(Service("story", "completions", CONTEXT), settings, text))

    async def stalled() -> AsyncIterator[bytes]:
        yield b'{"prompt": '
        await asyncio.Event().wait()

    response = ask("POST", "/v1/completions", content=stalled(), headers={"content-type": "application/json"})
    assert response.status_code == 408 and "0.05 s" in response.json()["error"]["message"]
    assert text.admitted_now == 0


def test_an_answer_that_breaks_off_says_so_in_the_stream(ask: Client, text: Local) -> None:
    text.fails, text.after = Unavailable("8 replicas in a row failed to answer"), 3
    response = ask("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 9, "stream": True})
    assert response.status_code == 200
    last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last == {"error": {"message": "8 replicas in a row failed to answer", "type": "server_error"}}
