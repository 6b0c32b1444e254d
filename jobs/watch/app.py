"""The live page over HTTP: its files, and the run's record as JSON. It only reads.

Nothing of the page comes from elsewhere, and it runs no script but its own and plotly's, which the Python
package ships.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.watch.record import RunRecord
from jobs.watch.source import Source
from jobs.watch.view import charts, current_plan, events, newest_whole, shares, summary
from runtime.spans import KINDS

FRESH_SECONDS = 0.4
"""The record is not read again within this time, however many look at it."""

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",  # plotly writes style elements of its own
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)

_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/grid.js": ("grid.js", "text/javascript"),
    "/timeline.js": ("timeline.js", "text/javascript"),
    "/lanes.js": ("lanes.js", "text/javascript"),
    "/charts.js": ("charts.js", "text/javascript"),
    "/words.js": ("words.js", "text/javascript"),
}


def is_own_host(header: str, names: Collection[str]) -> bool:
    """Whether a request's Host header names this server: an IP address, localhost or one of ``names``.

    A page elsewhere that has its own name resolve to this machine (DNS rebinding) gives that name.
    """
    host = header.strip().lower()
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    else:
        host = host.rpartition(":")[0] if ":" in host else host
    if host in {"localhost", *(name.lower() for name in names)}:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _Guard:
    """Answers only those that ask for this host, and says to browsers what the page may do."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        host = Request(scope).headers.get("host", "")
        if not is_own_host(host, self._names):
            refusal = PlainTextResponse("This server has another name.\n", status_code=421)
            await refusal(scope, receive, with_headers)
            return
        await self._app(scope, receive, with_headers)


@dataclass
class Shown:
    """The run's record and the JSON that is made of it, shared by all who look. Thread-safe.

    ``server`` tells this one from any other that listens, or has listened, at the same address.
    """

    source: Source
    clock: Callable[[], float] = time.time
    record: RunRecord = field(init=False)
    problem: str = ""
    server: str = field(default_factory=partial(secrets.token_hex, 8))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _read_at: float = float("-inf")
    _made: tuple[int, dict[str, Any]] = (-1, {})

    def __post_init__(self) -> None:
        self.record = RunRecord(self.source)

    def _follow(self) -> None:
        now = self.clock()
        if 0 <= now - self._read_at < FRESH_SECONDS:
            return
        self._read_at = now
        try:
            self.record.follow()
            self.problem = ""
        except OSError as error:  # what was read so far is still shown
            self.problem = str(error)

    def run(self) -> tuple[str, dict[str, Any]]:
        """(what changes when anything does, the run)."""
        with self._lock:
            self._follow()
            record = self.record
            if self._made[0] != record.version:
                newest = newest_whole(record)
                made = {
                    "charts": charts(record),
                    "events": events(record),
                    "plan": current_plan(record),
                    "shares": shares(newest) if newest else {},
                }
                self._made = (record.version, made)
            figures = summary(record, self.clock())
            body = {
                "run": {**figures, "problem": self.problem},
                **self._made[1],
                "plans": sorted(record.plans),
                "timeline": record.timeline_version,
                "now": self.clock(),
                "server": self.server,
            }
            tag = f"{self.server}-{record.version}-{figures['state']}-{hash(self.problem)}"
            return tag, body

    def timeline(self) -> tuple[str, dict[str, Any]]:
        with self._lock:
            self._follow()
            tag = f"{self.server}-{self.record.timeline_version}"
            return tag, {"kinds": KINDS, "steps": self.record.timeline}

    def plan(self, generation: int) -> dict[str, Any] | None:
        with self._lock:
            return self.record.plans.get(generation)


def build(source: Source, names: Collection[str] = ()) -> Starlette:
    """The page of the run at ``source``. ``names``: what this machine is called besides localhost."""
    shown = Shown(source)

    def run(request: Request) -> Response:
        return _unless_known(request, *shown.run())

    def timeline(request: Request) -> Response:
        return _unless_known(request, *shown.timeline())

    def plan(request: Request) -> Response:
        found = shown.plan(request.path_params["generation"])
        if found is None:
            return JSONResponse({"error": "no such plan is on record"}, status_code=404)
        return JSONResponse(found)

    routes = [
        Route("/api/run", run),
        Route("/api/timeline", timeline),
        Route("/api/plan/{generation:int}", plan),
        Route("/plotly.js", _static(get_plotlyjs().encode(), "text/javascript")),
    ]
    for path, (name, kind) in _FILES.items():
        routes.append(Route(path, _static(files("jobs.watch").joinpath(name).read_bytes(), kind)))
    return Starlette(routes=routes, middleware=[Middleware(_Guard, names=names)])


def _unless_known(request: Request, tag: str, body: dict[str, Any]) -> Response:
    """The body, or 304 to those who have it already."""
    tag = f'"{tag}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return JSONResponse(body, headers=headers)


def _static(content: bytes, kind: str) -> Callable[[Request], Response]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'

    def answer(request: Request) -> Response:
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return answer
