"""The one place that reads environment variables.

What a job computes is set by its recipe alone; the environment says only where things are.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where prepared data is kept between runs: ``$REKNIT_CACHE``, else ``~/.cache/reknit``."""
    folder = os.environ.get("REKNIT_CACHE", "")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "reknit"


def ray_address() -> str | None:
    """The Ray cluster that this process was started for (``$RAY_ADDRESS``, set in a submitted job)."""
    return os.environ.get("RAY_ADDRESS") or None


def serve_token() -> str | None:
    """The bearer token that ``reknit serve`` asks its clients for (``$REKNIT_SERVE_TOKEN``); None: none."""
    return os.environ.get("REKNIT_SERVE_TOKEN") or None
