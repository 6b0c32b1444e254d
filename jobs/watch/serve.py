"""``reknit dashboard``: one page on which a person sees a run, live or finished."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from rich.console import Console

from jobs.watch.app import build
from jobs.watch.source import source_of


def dashboard(run: str | Path, *, host: str, port: int, names: Sequence[str] = (), console: Console) -> None:
    """Serves the page of ``run``, a run's folder or its name on the cluster, until Ctrl-C.

    ``names``: what browsers call this machine, where that is neither localhost nor an IP address.
    Raises ValueError if there is no such run or the port is taken.
    """
    with source_of(run) as source:
        app = build(source, names)
        try:
            listener = socket.create_server((host, port), family=_family(host))
        except OSError as error:
            raise ValueError(
                f"cannot listen at {host}:{port} ({error.strerror}): name another --port"
            ) from None
        with listener:
            shown = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
            address = f"http://{shown}:{listener.getsockname()[1]}"
            said = f"{source.name} at {address}, until Ctrl-C"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
            config = uvicorn.Config(app, log_level="error", lifespan="off")
            uvicorn.Server(config).run(sockets=[listener])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
