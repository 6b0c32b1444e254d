"""Captions over HTTP: every way to send an image, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from PIL import Image

from jobs.data.media import decode_audio, decode_image, encode_samples, fit_image
from jobs.serving.app import DECODES, AppSettings, build
from jobs.serving.generation import Generation, Prompt
from jobs.serving.service import MOST_PIXELS, Service
from tests.support.answering import CAPTIONER, TOKENIZER, Client, Local, answering, events


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    folder = tmp_path_factory.mktemp("captions") / "run"
    with answering(folder, model="jobs.models.captioner:build", arguments=CAPTIONER) as local:
        yield local


@pytest.fixture
def caption(captions: Local) -> Client:
    service = Service("painter", "caption", 78, 18, TOKENIZER, 16, 1600, ("de", "en", "fr"))
    return Client(build(service, AppSettings(most_bytes=200_000), captions))


def png(seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def wav() -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.sin(np.arange(4000) / 9).astype(np.float32), 8000, format="WAV")
    return stream.getvalue()


def test_completions_are_not_to_be_had(caption: Client) -> None:
    assert "ask for POST /v1/caption" in caption("POST", "/v1/completions").json()["error"]["message"]


def test_few_images_are_decoded_at_once_be_it_for_clients_that_are_gone(
    captions: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service("painter", "caption", 78, 18, TOKENIZER, 16, 1600, ("de", "en", "fr"))
    app = build(service, AppSettings(), captions)
    decode, lock = Service.caption_prompt, threading.Lock()
    now: list[int] = [0]
    seen: list[int] = []

    def counted(*arguments: Any) -> Prompt:
        with lock:
            now[0] += 1
            seen.append(now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return decode(*arguments)

    monkeypatch.setattr(Service, "caption_prompt", counted)

    async def load() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:

            def ask() -> asyncio.Task[httpx.Response]:
                body = {"image": GOOD, "max_tokens": 1}
                return asyncio.create_task(client.post("/v1/caption", json=body))

            gone = [ask() for _ in range(8)]
            while not seen:
                await asyncio.sleep(0.001)
            for task in gone:
                task.cancel()
            await asyncio.gather(*gone, return_exceptions=True)
            return [(await task).status_code for task in [ask() for _ in range(8)]]

    assert asyncio.run(load()) == [200] * 8
    assert max(seen) == DECODES


def test_an_image_that_would_take_too_much_memory_is_refused(caption: Client) -> None:
    stream = io.BytesIO()
    Image.new("1", (MOST_PIXELS // 5000 + 1, 5000)).save(stream, "PNG")
    response = caption(
        "POST", "/v1/caption", content=stream.getvalue(), headers={"content-type": "image/png"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["message"] == (
        "the image has 5001 x 5000 pixels, more than 25,000,000 in all"
    )


def captioned(captions: Local, prompt: Prompt, most: int = 42) -> str:
    async def whole() -> list[int]:
        pieces = captions.host.generate(Generation(prompt, most, end=frozenset({TOKENIZER.end})), 1)
        return [token async for piece in pieces for token in piece.tokens]

    return TOKENIZER.decode(asyncio.run(whole()))


def test_a_caption_is_asked_for_with_the_bytes_that_training_sees(caption: Client, captions: Local) -> None:
    image, sound = png(1), wav()
    response = caption(
        "POST",
        "/v1/caption",
        files={"image": ("x.png", image, "image/png"), "audio": ("x.wav", sound, "audio/wav")},
        data={"language": "fr", "max_tokens": "20"},
    )
    assert response.status_code == 200, response.text
    seen = captions.asked[-1]
    pixels = fit_image(decode_image(image), 16).tobytes()
    clip = encode_samples(decode_audio(sound, rate=1600))
    assert seen.prompt == Prompt((TOKENIZER.language("fr"),), pixels, clip)
    assert seen.max_tokens == 20 and seen.end == {TOKENIZER.end}
    assert response.json()["caption"] == captioned(captions, seen.prompt, 20)


def test_all_ways_to_send_an_image_give_the_same(caption: Client, captions: Local) -> None:
    image = png(2)
    encoded = base64.b64encode(image).decode()
    answers = [
        caption("POST", "/v1/caption", files={"image": ("x.png", image)}),
        caption("POST", "/v1/caption", files={"image": ("x.png", image), "audio": ("", b"")}),
        caption("POST", "/v1/caption", json={"image": encoded}),
        caption("POST", "/v1/caption", json={"image": f"data:image/png;base64,{encoded}", "language": "en"}),
        caption("POST", "/v1/caption", content=image, headers={"content-type": "image/png"}),
    ]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["caption"] for answer in answers}) == 1
    streamed = caption("POST", "/v1/caption", json={"image": encoded, "stream": True})
    parts = events(streamed)
    assert "".join(part["text"] for part in parts) == answers[0].json()["caption"]
    assert parts[-1]["finish_reason"] in ("stop", "length")
    assert captions.asked[-1].prompt.tokens == (TOKENIZER.language("en"),)


GOOD = base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ({"json": {}}, 400, "there is no image"),
        ({"json": {"image": ""}}, 400, "there is no image"),
        ({"json": {"image": "https://example.org/cat.png"}}, 400, "is an address, and none is fetched"),
        ({"json": {"image": "file:///etc/passwd"}}, 400, "is an address, and none is fetched"),
        ({"json": {"image": "!!!"}}, 400, "image is no base64"),
        ({"json": {"image": 7}}, 400, "image must be a string"),
        ({"json": {"image": base64.b64encode(b"hello").decode()}}, 400, "not an image"),
        ({"json": {"image": base64.b64encode(png()[:300]).decode()}}, 400, "broken"),
        ({"json": {"image": GOOD, "language": "tlh"}}, 400, '"tlh" is not known: choose from de, en, fr'),
        ({"json": {"image": GOOD, "language": ""}}, 400, "language is not as it should be"),
        ({"json": {"image": GOOD, "audio": base64.b64encode(b"nothing").decode()}}, 400, "not a sound"),
        ({"json": {"image": GOOD, "url": "x"}}, 400, "the field url is not known"),
        ({"json": {"image": GOOD, "max_tokens": -4}}, 400, "max_tokens is not as it should be"),
        ({"json": {"image": GOOD, "max_tokens": 60}}, 400, "has room for 59"),
        ({"files": {"audio": ("a.wav", wav())}}, 400, "there is no image"),
        ({"files": {"image": ("x.png", b"")}}, 400, "there is no image"),
        ({"files": {"image": ("x.png", png())}, "data": {"max_tokens": "many"}}, 400, "max_tokens"),
        ({"files": {"image": ("x.png", png())}, "data": {"wrong": "1"}}, 400, "wrong is not known"),
        ({"files": [("image", ("x", png())), ("image", ("y", png()))]}, 400, "more than one field image"),
        ({"content": b"x", "type": "multipart/form-data"}, 400, "names no boundary"),
        ({"content": b"--b\r\n", "type": "multipart/form-data; boundary=b"}, 400, "cut short"),
        ({"content": b"--b\r\nx\r\n--b--", "type": "multipart/form-data; boundary=b"}, 400, "no header"),
        ({"content": b"x", "type": "text/plain"}, 415, "multipart/form-data or image/*"),
        ({"content": b"x", "type": "image/png"}, 400, "not an image"),
        ({"content": b"x" * 300_000, "type": "image/png"}, 413, "larger than 200,000 bytes"),
        (
            {"content": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>',
             "type": "image/svg+xml"},
            400,
            "outside itself",
        ),
    ],
)  # fmt: skip
def test_bad_captions_get_one_sentence(
    caption: Client, captions: Local, arguments: dict[str, Any], status: int, message: str
) -> None:
    before = len(captions.asked)
    arguments = dict(arguments)
    kind = arguments.pop("type", None)
    if kind is not None:
        arguments["headers"] = {"content-type": kind}
    response = caption("POST", "/v1/caption", **arguments)
    assert response.status_code == status, response.text
    said = response.json()["error"]["message"]
    assert message in said and "\n" not in said
    assert len(captions.asked) == before
