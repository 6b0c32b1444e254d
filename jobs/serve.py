"""``reknit serve``: answers over HTTP with a run's checkpoints, on Ray Serve."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path

from rich.console import Console

from actors.cluster import connect, gcs_address
from actors.serving import Scale, ServedApplication, application
from jobs.interruption import interruptible
from jobs.serving.app import AppSettings, build
from jobs.serving.host import WATCH_SECONDS, EngineHost
from jobs.serving.scheduler import Limits
from jobs.serving.source import RunSource, service_of
from jobs.terminal import plain_console
from runtime.run_folder import RunFolder
from runtime.settings import serve_token, targets_folder
from runtime.targets import announce, withdraw

_LOCAL = ("127.0.0.1", "localhost", "::1")


@contextmanager
def serving(
    run: str | Path,
    *,
    checkpoint: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    scale: Scale | None = None,
    limits: Limits | None = None,
    threads: int = 1,
    most_bytes: int = 16 << 20,
    token: str | None = None,
    address: str | None = None,
    watch_seconds: float = WATCH_SECONDS,
) -> Iterator[tuple[ServedApplication, str]]:
    """Serves a run until the end of the block; yields the application and its URL.

    ``checkpoint`` None serves the newest one and takes over newer ones. ``port`` 0 takes any free one.
    ``threads`` are a replica's compute threads. Raises ValueError for a mistake in the arguments, a run
    that cannot be served, or a port that is taken.
    """
    source = RunSource(Path(run).expanduser().absolute(), checkpoint)
    _, decoder = source.first()
    service = service_of(source, decoder)
    scale = scale or Scale()
    port = _free_port(host, port)
    app = application(
        partial(EngineHost, source, limits or Limits(), threads, watch_seconds),
        partial(build, service, AppSettings(token, most_bytes)),
        scale,
    )
    shown = f"[{host}]" if ":" in host else host
    with connect(address, scale.most, scale.cpus, 0.0), ServedApplication(app, host, port) as served:
        # requests are taken in on the head's machine
        head = gcs_address().rpartition(":")[0].strip("[]")
        with _announced(service.name, host, port, head):
            yield served, f"http://{shown}:{port}"


def serve(
    run: str | Path,
    *,
    checkpoint: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: tuple[int, int] = (1, 1),
    queue: int = 128,
    threads: int = 1,
    most_bytes: int = 16 << 20,
    silence_seconds: float = 10.0,
    address: str | None = None,
    console: Console | None = None,
) -> None:
    """Serves a run until Ctrl-C or SIGTERM. Arguments are those of ``serving`` and ``Scale``; the bearer
    token is ``runtime.settings.serve_token``. Raises ValueError."""
    console = console or plain_console()
    token = serve_token()
    least, most = replicas
    for name, value, lowest in (
        ("threads", threads, 1),
        ("max-request-mb", most_bytes >> 20, 1),
        ("queue", queue, 0),
    ):
        if value < lowest:
            raise ValueError(f"{name} is {value}: it must be at least {lowest}")
    folder = RunFolder(run)
    folder.facts()  # before anything is written there
    interrupted = threading.Event()
    with interruptible(interrupted.set):
        served = serving(
            run,
            checkpoint=checkpoint,
            host=host,
            port=port,
            scale=Scale(least, most, cpus=float(threads), queued=queue, silence_seconds=silence_seconds),
            threads=threads,
            most_bytes=most_bytes,
            token=token,
            address=address,
        )
        with _aside(folder.ray_log), served as (_, url):
            console.print(f"serving {run} at {url}", highlight=False, markup=False, soft_wrap=True)
            if token is None and host not in _LOCAL:
                console.print(
                    "anybody who reaches this machine may ask: set REKNIT_SERVE_TOKEN to want a token",
                    highlight=False,
                    soft_wrap=True,
                )
            interrupted.wait()
            console.print("stopping", highlight=False)


@contextmanager
def _announced(name: str, host: str, port: int, address: str) -> Iterator[None]:
    """Prometheus finds the service meanwhile."""
    folder = targets_folder()
    with suppress(OSError):  # answers do not depend on it
        announce(folder, "serve", name, host, port, address=address)
    try:
        yield
    finally:
        withdraw(folder, "serve", name)


@contextmanager
def _aside(log: Path) -> Iterator[None]:
    """What Ray prints goes to ``log``."""
    with log.open("a", encoding="utf-8") as stream, redirect_stdout(stream), redirect_stderr(stream):
        yield


def _free_port(host: str, port: int) -> int:
    """``port``, or a free one for 0. Raises ValueError if it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cannot listen at {host}:{port} ({error}): choose another --host or --port (0: any free one)"
        ) from None
