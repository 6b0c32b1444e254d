"""Where Prometheus finds what is under way on machines without Kubernetes: files for ``file_sd_configs``.

One file for each run and each service, in one folder, so that a pattern finds them all:
``[{"targets": ["127.0.0.1:38859"], "labels": {}}]``. Prometheus looks again whenever a file comes or goes.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Literal

Kind = Literal["train", "serve"]

_WILDCARDS = ("", "0.0.0.0", "::")


def target_file(folder: Path, kind: Kind, name: str) -> Path:
    """The file of the run or service called ``name``; ``pattern`` finds it."""
    return folder / f"{kind}-{re.sub(r'[^A-Za-z0-9._-]', '-', name)}.json"


def pattern(folder: Path, kind: Kind) -> str:
    """All files of ``kind``, as Prometheus reads patterns."""
    return str(folder / f"{kind}-*.json")


def announce(folder: Path, kind: Kind, name: str, host: str, port: int, *, address: str) -> None:
    """Says that metrics are served at ``host`` and ``port``; where ``host`` stands for every address of its
    machine, they are asked for at ``address``. Raises OSError."""
    shown = address if host in _WILDCARDS else host
    target = f"[{shown}]:{port}" if ":" in shown else f"{shown}:{port}"
    folder.mkdir(parents=True, exist_ok=True)
    file = target_file(folder, kind, name)
    # whole or not at all, under a name that no pattern finds until then
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps([{"targets": [target], "labels": {}}]) + "\n", encoding="utf-8")
    temporary.replace(file)


def withdraw(folder: Path, kind: Kind, name: str) -> None:
    """It is over, if it ever began."""
    with suppress(OSError):
        target_file(folder, kind, name).unlink(missing_ok=True)
