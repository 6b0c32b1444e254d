"""A real Chromium, and a page in it on which any error of a script fails the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

CHROMIUM = Path("/usr/bin/chromium")

needs_chromium = pytest.mark.skipif(
    not CHROMIUM.exists(), reason="needs the Debian package chromium (/usr/bin/chromium)"
)

PATIENCE_MS = 120_000
"""A browser that starts beside other tests may need a minute for its first page."""


@contextmanager
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as run:
        opened = run.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The address at which an ASGI application is served meanwhile."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    started = threading.Event()
    startup = server.startup

    async def tell(*arguments: Any, **others: Any) -> None:
        await startup(*arguments, **others)
        started.set()

    server.startup = tell  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def page(
    browser: Any, url: str, scheme: str = "light", width: int = 1280, but: str | None = None
) -> Iterator[Any]:
    """``scheme`` is what the system prefers. What is refused by the page's own policy is an error too;
    ``but``: what an error that belongs to the test says."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    context.set_default_timeout(PATIENCE_MS)
    opened = context.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.goto(url)
    yield opened
    context.close()
    assert [problem for problem in problems if but is None or but not in problem] == []
