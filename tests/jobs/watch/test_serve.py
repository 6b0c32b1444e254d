"""The command that serves the page."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from jobs.exits import INTERRUPTED
from jobs.watch.serve import dashboard
from tests.support.made_run import make_run

ROOT = Path(__file__).parent.parent.parent.parent


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=3, finished=False)
    command = [sys.executable, "-m", "jobs.cli", "dashboard", str(folder.path), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("made at http://127.0.0.1:"), "nobody else's machine is let in unasked"
            address = line.split()[2].rstrip(",")
            assert httpx.get(f"{address}/api/run").json()["run"]["step"] == 3
            process.send_signal(signal.SIGINT)
            assert process.wait(30) in (0, INTERRUPTED)
        finally:
            process.kill()


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=1, finished=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen at 127.0.0.1:{port} .*name another --port"):
            dashboard(folder.path, host="127.0.0.1", port=port, console=Console())


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        dashboard(tmp_path, host="127.0.0.1", port=0, console=Console())
