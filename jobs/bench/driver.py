"""A Ray driver of a peer's in a process of its own, as it would be for a user."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Driver:
    """``python -m module ORDER``, with ``order`` as JSON in ``folder``, where its output goes too;
    runs until ``close``."""

    def __init__(self, module: str, order: Mapping[str, Any], folder: Path) -> None:
        path = folder / "order.json"
        path.write_text(json.dumps(order), encoding="utf-8")
        self._log = folder / "driver.log"
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(path)],
                cwd=Path(__file__).parents[2],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def close(self) -> None:
        """The process is gone, and with it the job's actors."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def check(self) -> None:
        """Raises RuntimeError if the driver ended by itself."""
        if self._process.poll() is not None:
            last = self._log.read_text(encoding="utf-8").splitlines()[-1:]
            raise RuntimeError(f"Ray Train's driver ended by itself: {last}")
