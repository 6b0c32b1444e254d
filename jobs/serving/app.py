"""The HTTP interface: completions, captions, health, metrics and the page, as one ASGI application."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from actors.serving import Overloaded, Piece, Unavailable
from jobs.serving.answers import Answer, caption_format, completion_format
from jobs.serving.generation import Generation
from jobs.serving.meter import Meter
from jobs.serving.requests import (
    DEFAULT_TOKENS,
    Body,
    CaptionRequest,
    CompletionRequest,
    RequestError,
    read_caption,
    read_completion,
)
from jobs.serving.service import Service

DECODES = 2
"""Images and sounds that are decoded at once: each may take some hundred MB."""

WHOLE = 32
"""Tokens in a piece of an answer that is not streamed."""

GONE = 499
"""What is counted as the status where a client has gone before there was one (as nginx does)."""

Handler = Callable[[Request, AsyncExitStack], Awaitable[Response]]
"""What it puts on the stack is given back when the response has been sent, or cannot be."""


class Backend(Protocol):
    """``actors.serving.Replicas``, or what stands for them."""

    continued: int

    def admitted(self) -> AbstractContextManager[None]: ...

    def generate(self, asked: Generation, every: int) -> AsyncIterator[Piece]: ...

    async def stats(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class AppSettings:
    """``token`` None: nobody is asked for one. ``most_bytes`` is the longest body, ``body_seconds`` how long
    it may take to come."""

    token: str | None = None
    most_bytes: int = 16 << 20
    body_seconds: float = 60.0


class App:
    """One service's endpoints over a backend."""

    def __init__(self, service: Service, settings: AppSettings, backend: Backend) -> None:
        self._service, self._settings, self._backend = service, settings, backend
        self._meter = Meter(service.name)
        # threads of its own, since one that decodes goes on when its client is gone
        self._decoders = ThreadPoolExecutor(DECODES, thread_name_prefix="decode")
        self._page = files("jobs.serving").joinpath("page.html").read_text(encoding="utf-8")
        self._began = int(time.time())

    def asgi(self) -> Starlette:
        def route(path: str, method: str, handler: Handler) -> Route:
            return Route(path, _Guarded(path, handler, self._settings.token, self._meter), methods=[method])

        routes = [
            Route("/", self._show_page, methods=["GET"]),
            Route("/healthz", self._health, methods=["GET"]),
            route("/metrics", "GET", self._metrics),
            route("/v1/models", "GET", self._models),
            route("/v1/service", "GET", self._about),
            route("/v1/completions", "POST", self._complete),
            route("/v1/caption", "POST", self._caption),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _no_such_route})

    async def _body(self, request: Request) -> Body:
        most = self._settings.most_bytes
        too_large = RequestError(413, f"the request is larger than {most:,} bytes: send less")
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            raise too_large
        content = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > most:
                        raise too_large
        except TimeoutError:
            seconds = self._settings.body_seconds
            raise RequestError(408, f"the request has not come within {seconds:g} s: send less") from None
        return Body(request.headers.get("content-type", ""), bytes(content))

    # Endpoints.

    async def _show_page(self, _: Request) -> Response:
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        policy += (
            "img-src blob: data:; media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'"
        )
        return HTMLResponse(self._page, headers={"Content-Security-Policy": policy})

    async def _health(self, _: Request) -> Response:
        replicas = await self._backend.stats()
        values = {
            "status": "ok" if replicas else "no replica answers",
            "run": self._service.name,
            "replicas": len(replicas),
            "checkpoints": sorted({each["version"] for each in replicas}),
        }
        return JSONResponse(values, 200 if replicas else 503)

    async def _metrics(self, _: Request, __: AsyncExitStack) -> Response:
        text = self._meter.text(await self._backend.stats(), self._backend.continued)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def _models(self, _: Request, __: AsyncExitStack) -> Response:
        model = {
            "id": self._service.name,
            "object": "model",
            "created": self._began,
            "owned_by": "reknit",
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def _about(self, _: Request, __: AsyncExitStack) -> Response:
        service = self._service
        return JSONResponse(
            {
                "run": service.name,
                "kind": service.kind,
                "context": service.context - service.prefix,
                "languages": service.languages,
                "audio": service.audio_rate is not None,
                "most_bytes": self._settings.most_bytes,
            }
        )

    async def _complete(self, request: Request, held: AsyncExitStack) -> Response:
        if self._service.kind != "completions":
            raise RequestError(404, "this run writes captions: ask for POST /v1/caption")
        held.enter_context(self._backend.admitted())
        asked = read_completion(await self._body(request))
        self._check_model(asked)
        generation = self._generation(asked, self._service.text_prompt(asked.prompt))
        return await self._answer(asked, generation, completion_format(self._service.name), asked.stops, held)

    async def _caption(self, request: Request, held: AsyncExitStack) -> Response:
        if self._service.kind != "caption":
            raise RequestError(404, "this run completes text: ask for POST /v1/completions")
        held.enter_context(self._backend.admitted())
        asked = read_caption(await self._body(request))
        self._check_model(asked)
        prompt = await asyncio.get_running_loop().run_in_executor(
            self._decoders, self._service.caption_prompt, asked.image, asked.language, asked.audio
        )
        generation = self._generation(asked, prompt)
        return await self._answer(asked, generation, caption_format(self._service.name), (), held)

    def _check_model(self, asked: CompletionRequest | CaptionRequest) -> None:
        if asked.model is not None and asked.model != self._service.name:
            raise RequestError(404, f"there is no model {asked.model} here: it is {self._service.name}")

    def _generation(self, asked: CompletionRequest | CaptionRequest, prompt: Any) -> Generation:
        room = self._service.room(prompt)
        if room < 1:
            raise RequestError(
                400,
                f"the prompt has {len(prompt.tokens)} tokens and leaves no room for an answer: the model's "
                f"context is {self._service.context - self._service.prefix}",
            )
        most = asked.max_tokens or min(DEFAULT_TOKENS, room)
        if most > room:
            raise RequestError(
                400,
                f"max_tokens is {most}, but after the prompt's {len(prompt.tokens)} tokens the model's "
                f"context has room for {room}: lower max_tokens or shorten the prompt",
            )
        return Generation(prompt, most, asked.sampling(), self._service.end)

    async def _answer(
        self,
        asked: CompletionRequest | CaptionRequest,
        generation: Generation,
        format_: Callable[..., dict[str, Any]],
        stops: tuple[str, ...],
        held: AsyncExitStack,
    ) -> Response:
        began = time.monotonic()
        answer = Answer(self._service.decode_stream, len(generation.prompt.tokens), stops)
        identity = f"{self._service.kind}-{uuid.uuid4().hex}"
        described = partial(format_, identity, int(time.time()), answer)
        texts = self._texts(answer, self._backend.generate(generation, 1 if asked.stream else WHOLE))
        held.push_async_callback(texts.aclose)  # a client may go before it has been sent anything
        try:
            first = await anext(texts)
        except StopAsyncIteration:
            first = ""
        self._meter.first_token_seconds.observe(time.monotonic() - began)
        if asked.stream:
            return StreamingResponse(
                _events(first, texts, described),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            )
        whole = first + "".join([text async for text in texts])
        return JSONResponse(described(whole, final=True, whole=True))

    async def _texts(self, answer: Answer, pieces: AsyncIterator[Piece]) -> AsyncGenerator[str, None]:
        """An answer's text as it comes; ends what generates it when the text ends, or nobody wants more."""
        try:
            async for piece in pieces:
                before = answer.tokens
                text = answer.take(piece)
                self._meter.tokens.inc(answer.tokens - before)
                yield text
                if answer.finish is not None:
                    return
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]


class _Guarded:
    """One route: who may ask, what is said of a failure, and how often it is asked."""

    def __init__(self, path: str, handler: Handler, token: str | None, meter: Meter) -> None:
        self._path, self._handler, self._token, self._meter = path, handler, token, meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        status = GONE
        self._meter.under_way.inc()
        try:
            async with AsyncExitStack() as held:
                response = await self._response(Request(scope, receive), held)
                status = response.status_code
                await response(scope, receive, send)
        except ClientDisconnect:
            raise
        except Exception:
            status = 500
            raise
        finally:
            self._meter.under_way.dec()
            self._meter.answered(self._path, status, time.monotonic() - began)

    async def _response(self, request: Request, held: AsyncExitStack) -> Response:
        try:
            self._check_token(request)
            return await self._handler(request, held)
        except RequestError as error:
            return _error(error.status, str(error), error.headers)
        except ValueError as error:  # what a model cannot take, or media that are broken
            return _error(400, str(error), {})
        except Overloaded as error:
            return _error(429, str(error), {"Retry-After": str(error.seconds)})
        except Unavailable as error:
            return _error(503, str(error), {"Retry-After": "1"})

    def _check_token(self, request: Request) -> None:
        token = self._token
        if token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise RequestError(
                401,
                "the bearer token is missing or wrong: send it in the header Authorization",
                WWW_Authenticate="Bearer",
            )


async def _events(
    first: str, texts: AsyncIterator[str], described: Callable[..., dict[str, Any]]
) -> AsyncIterator[bytes]:
    """Server-sent events: one for each piece of text, a last one with the reason and the counts."""
    try:
        if first:
            yield _event(described(first))
        async for text in texts:
            if text:
                yield _event(described(text))
        yield _event(described("", final=True))
        yield b"data: [DONE]\n\n"
    except (Unavailable, ValueError) as error:
        yield _event({"error": {"message": str(error), "type": "server_error"}})


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _error(status: int, message: str, headers: dict[str, str]) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    # what a client sent may be quoted, half a surrogate pair among it, which no answer could hold
    shown = message.encode("utf-8", errors="backslashreplace").decode()
    return JSONResponse({"error": {"message": shown, "type": kind}}, status, headers)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
    else:
        message = (
            f"there is no {request.url.path}: ask for /, /v1/caption, /v1/completions, /healthz or /metrics"
        )
    return _error(error.status_code, message, dict(error.headers or {}))


def build(service: Service, settings: AppSettings, backend: Backend) -> Starlette:
    """The application for ``actors.serving.Ingress``."""
    return App(service, settings, backend).asgi()
