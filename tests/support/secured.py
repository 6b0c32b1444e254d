"""Trains as a job of a Ray cluster that asks for tokens, and looks for its secrets where others could.

A process of its own, since Ray reads a process's token once. Usage: secured.py FOLDER; prints JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import ray
from typer.testing import CliRunner

from jobs.cli import app
from runtime.run_folder import RunFolder
from tests.support.dashboard import dashboard_cluster
from tests.support.ray_jobs import toy_recipe, wait_until

ROOT = Path(__file__).parent.parent.parent
SECRETS = ("RAY_AUTH_TOKEN", "REKNIT_FABRIC_SECRET")


def main(folder: Path) -> None:
    secrets = [os.environ[name].encode() for name in SECRETS]
    work = folder / "work"
    work.mkdir()
    data = {"build": "tests.support.toys:build_paced_tokens", "arguments": {"seconds": 0.05}}
    (work / "toy.toml").write_text(toy_recipe("toy", 16, 2, 1, data=data).to_toml())
    run = RunFolder(folder / "runs" / "toy")
    with dashboard_cluster(1, 2) as head:
        places = ["--working-dir", str(work), "--runs", str(folder / "runs"), "--env", f"PYTHONPATH={ROOT}"]
        words = ["submit", str(work / "toy.toml"), "--id", "toy", *places, "--no-wait", "--address", head.url]
        submitted = CliRunner().invoke(app, words)
        assert submitted.exit_code == 0, submitted.output
        wait_until(lambda: len(run.read_steps().steps) >= 2, "steps")
        seen = [name for name, line in command_lines() if any(secret in line for secret in secrets)]
        with ThreadPoolExecutor() as side_by_side:
            told = side_by_side.map(partial(asked, head.url), ({}, {"RAY_AUTH_TOKEN": "0" * 64}))
        strangers = dict(zip(("none", "wrong"), told, strict=True))
        ended = CliRunner().invoke(app, ["logs", "-f", "toy", "--address", head.url])
        written = [
            str(path)
            for root in (folder, Path(ray._private.worker._global_node.get_session_dir_path()))
            for path in root.rglob("*")
            if path.is_file() and any(secret in path.read_bytes() for secret in secrets)
        ]
    outcome = {
        "exit_code": ended.exit_code,
        "command_lines": seen,
        "files": written,
        "looked_at": sum(1 for path in folder.rglob("*") if path.is_file()),
        "strangers": strangers,
        "recipe": str(run.recipe),
        "bits": [[s.loss, s.grad_norm, s.fingerprint] for s in run.read_steps().steps],
    }
    print(json.dumps(outcome))


def command_lines() -> Iterator[tuple[str, bytes]]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            yield process.name, (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended


def asked(url: str, more: dict[str, str]) -> tuple[int, str]:
    """What somebody without the cluster's token is told."""
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    told = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "list", "--address", url],
        env={**environment, "RAY_AUTH_MODE": "token" if more else "disabled", **more},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return told.returncode, told.stderr + told.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
