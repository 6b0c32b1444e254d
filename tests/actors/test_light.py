"""Who decides, asks, decodes or passes on imports no PyTorch: it is most of what its start would take. Who
computes imports what it needs and no more: a newcomer's start is time that the others train without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIGHT = {
    "a recipe is read": "jobs.recipe.recipe",
    "a controller": "actors.ray_controller",
    "its job is unpickled": "jobs.builders",
    "a run is asked": "actors.cluster jobs.control jobs.cli jobs.cli_jobs jobs.cli_watch",
    "a run is shown to somebody": "jobs.train",
    "a job is submitted": "jobs.submission actors.jobs",
    "manifests are written": "jobs.kubernetes jobs.pods",
    "a set is curated": "jobs.curate jobs.curation.pipeline jobs.curation.work",
    "a run is watched": "jobs.watch.app jobs.watch.top jobs.watch.trace jobs.watch.source",
    "HTTP is passed on": "actors.serving jobs.serving.app",
}
WORKER = "actors.ray_worker jobs.builders actors.workshop"
CODE = """
import importlib, sys
unwanted, *names = sys.argv[1:]
for name in names:
    importlib.import_module(name)
    if unwanted in sys.modules:
        sys.exit(f"{name} imports {unwanted}")
"""


def imported(folder: Path, unwanted: str, *names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, unwanted, *names]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_who_computes_nothing_imports_no_pytorch() -> None:
    done = imported(ROOT, "torch", *(name for names in LIGHT.values() for name in names.split()))
    assert done.returncode == 0, done.stderr


def test_it_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "torch.py").touch()
    (tmp_path / "heavy.py").write_text("import torch")
    assert "heavy imports torch" in imported(tmp_path, "torch", "json", "heavy").stderr


def test_a_worker_validates_nothing() -> None:
    done = imported(ROOT, "pydantic", *WORKER.split())
    assert done.returncode == 0, done.stderr
