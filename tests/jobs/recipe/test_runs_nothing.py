"""A recipe names the code that runs; reading it runs none, and its other words are never code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app

ROOT = Path(__file__).parents[3]
TRAP = "from pathlib import Path\nPath({marker!r}).touch()\n"
RECIPE = """
[run]
name = "toy"
steps = 2
[model]
build = "trap:model"
[data]
build = "trap:data"
[optimizer]
learning_rate = 0.01
[parallel]
workers = 1
micro_batches = 1
micro_batch_size = 1
"""
READERS = {
    "read": "import sys; from jobs.recipe.recipe import load_recipe; load_recipe(sys.argv[1])",
    "rendered": (
        "import sys; from jobs.cli import main; recipe, output = sys.argv[1:];"
        "sys.argv[1:] = ['k8s', 'render', recipe, '--image', 'reknit:1', '--output', output]; main()"
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_recipe_is_read_without_the_modules_that_it_names(tmp_path: Path, reader: str) -> None:
    marker, recipe = tmp_path / "it ran", tmp_path / "toy.toml"
    (tmp_path / "trap.py").write_text(TRAP.format(marker=str(marker)))
    recipe.write_text(RECIPE)
    done = run(tmp_path, READERS[reader], str(recipe), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert not marker.exists()
    run(tmp_path, "import trap")
    assert marker.exists(), "else the trap proves nothing"


@pytest.mark.parametrize("build", ["trap", "__import__('os').system('touch x'):f", "../trap:f", "trap:f()"])
def test_what_is_built_is_a_name_and_no_expression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: str
) -> None:
    marker, recipe = tmp_path / "it ran", tmp_path / "toy.toml"
    (tmp_path / "trap.py").write_text(TRAP.format(marker=str(marker)))
    recipe.write_text(RECIPE.replace("trap:model", build))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    done = CliRunner().invoke(app, ["train", str(recipe)])
    assert done.exit_code == 2, done.output
    assert "model.build" in done.output
    assert not (tmp_path / "x").exists() and not marker.exists()


def run(folder: Path, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        env={"PYTHONPATH": f"{ROOT}:{folder}", "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
