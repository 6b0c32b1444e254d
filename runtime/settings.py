"""The one place that reads environment variables.

What a job computes is set by its recipe alone; the environment says only where things are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FABRIC_SECRET = "REKNIT_FABRIC_SECRET"

_RAY_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def cache_folder() -> Path:
    """Where prepared data is kept between runs: ``$REKNIT_CACHE``, else ``~/.cache/reknit``."""
    folder = os.environ.get("REKNIT_CACHE", "")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "reknit"


def targets_folder() -> Path:
    """Where runs of this machine say that their metrics can be had (``runtime.targets``)."""
    return cache_folder() / "targets"


def ray_address() -> str | None:
    """The Ray cluster that this process was started for (``$RAY_ADDRESS``, set in a submitted job)."""
    return os.environ.get("RAY_ADDRESS") or None


def dashboard_address() -> str:
    """Where the head's dashboard is: ``$RAY_API_SERVER_ADDRESS`` or ``$RAY_ADDRESS`` where that is a URL,
    else this machine's, at Ray's default port."""
    for name in _RAY_ADDRESSES:
        value = os.environ.get(name, "")
        if is_url(value):
            return value
    return "http://127.0.0.1:8265"


def is_url(address: str | None) -> bool:
    """Whether an address of a Ray cluster is that of its dashboard."""
    return address is not None and address.startswith(("http://", "https://"))


@contextmanager
def without_ray_addresses() -> Iterator[None]:
    """Hides Ray's own variables meanwhile, which Ray prefers to an address that it is given."""
    hidden = {name: os.environ.pop(name) for name in _RAY_ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def fabric_secret() -> bytes | None:
    """The secret of all runs on this cluster (``$REKNIT_FABRIC_SECRET``); None: every run makes its own."""
    return os.environ.get(FABRIC_SECRET, "").encode() or None


def serve_token() -> str | None:
    """The bearer token that ``reknit serve`` asks its clients for (``$REKNIT_SERVE_TOKEN``); None: none."""
    return os.environ.get("REKNIT_SERVE_TOKEN") or None


def be_local_rank(rank: int) -> None:
    """Says which of its machine's devices this process uses, in the variable without which DeepSpeed does not
    start. Ray shows a process its own devices only, so they count from 0."""
    os.environ["LOCAL_RANK"] = str(rank)
