"""What a command cannot help ends with a sentence and an exit code, and what is a defect with a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from jobs.cli import app
from jobs.exits import CONTACT_LOST, RUN_ERROR, USER_ERROR, RunFailed, errors
from runtime.checkpoint import CheckpointDamaged
from tests.support.served import make_run, write_checkpoint


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("said"), USER_ERROR),
        (FileNotFoundError("said"), USER_ERROR),
        (RunFailed("said"), RUN_ERROR),
        (ConnectionResetError("said"), CONTACT_LOST),
        (OSError("said"), RUN_ERROR),
        (PermissionError("said"), RUN_ERROR),
        (CheckpointDamaged("said"), RUN_ERROR),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_sentence_and_a_code(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, errors():
        raise error
    assert ended.value.exit_code == code
    said = capsys.readouterr().err
    assert said.startswith("reknit: ") and said.endswith("said\n") and said.count("\n") == 1


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(KeyError), errors():
        raise KeyError("defect")


def damage_run(folder: Path) -> list[str]:
    file = next((folder / "run" / "checkpoints" / "step-00000010").glob("worker-*"))
    file.write_bytes(file.read_bytes()[:-1])
    return ["checkpoint", "export", str(folder / "run"), str(folder / "other"), "--step", "10"]


def damage_manifest(folder: Path) -> list[str]:
    (folder / "run" / "checkpoints" / "step-00000010" / "manifest.json").write_text("{}")
    return ["checkpoint", "export", str(folder / "run"), str(folder / "other"), "--step", "10"]


def cut_universal(folder: Path) -> list[str]:
    for file in (folder / "universal").rglob("exp_avg.pt"):
        file.write_bytes(file.read_bytes()[:100])
    return import_of(folder)


def empty_universal(folder: Path) -> list[str]:
    for file in (folder / "universal").rglob("exp_avg.pt"):
        file.write_bytes(b"")
    return import_of(folder)


def below_a_file(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return ["checkpoint", "export", str(folder / "run"), str(folder / "file" / "universal")]


def import_of(folder: Path) -> list[str]:
    recipe, target = str(folder / "run" / "recipe.toml"), str(folder / "back")
    return ["checkpoint", "import", str(folder / "universal"), recipe, "--run-folder", target]


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        (damage_run, "step-00000010/worker-"),
        (damage_manifest, "manifest.json cannot be read"),
        (cut_universal, "exp_avg.pt cannot be read"),
        (empty_universal, "exp_avg.pt cannot be read"),
        (below_a_file, "Not a directory"),
    ],
)
def test_checkpoints_that_cannot_be_read_or_written(
    tmp_path: Path, prepare: Callable[[Path], list[str]], told: str
) -> None:
    write_checkpoint(tmp_path / "run", make_run(tmp_path / "run"), 10, 1)
    command = ["checkpoint", "export", str(tmp_path / "run"), str(tmp_path / "universal")]
    assert CliRunner().invoke(app, command).exit_code == 0
    result = CliRunner().invoke(app, prepare(tmp_path))
    assert result.exit_code == RUN_ERROR, result.exception
    assert result.stderr.startswith("reknit: ") and told in result.stderr and "Traceback" not in result.stderr
