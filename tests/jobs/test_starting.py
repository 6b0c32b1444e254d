"""A run that could not be started leaves no folder that a later ``--resume`` takes for the newest run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jobs import train as module
from jobs.recipe.recipe import Recipe
from jobs.train import train
from runtime.run_folder import RunFolder
from tests.support.ray_jobs import toy_recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    return toy_recipe("begun", 3, 2, "auto")


def no_cluster(*_: object, **__: object) -> None:
    raise ValueError("no Ray cluster answers")


def begun_before(tmp_path: Path, recipe: Recipe) -> Path:
    folder = RunFolder.create(tmp_path / "runs" / "begun-before", recipe.to_toml(), {}).path
    assert newest(recipe) == folder
    return folder


def newest(recipe: Recipe) -> Path:
    return module._run_path(recipe, None, resume=True)


def test_detached_without_a_cluster(tmp_path: Path, recipe: Recipe) -> None:
    earlier = begun_before(tmp_path, recipe)
    with pytest.raises(ValueError, match="needs a Ray cluster that outlives this command"):
        train(recipe, detach=True)
    assert newest(recipe) == earlier
    assert list((tmp_path / "runs").iterdir()) == [earlier]


def test_no_cluster_answers(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = begun_before(tmp_path, recipe)
    monkeypatch.setattr(module, "connect", no_cluster)
    with pytest.raises(ValueError, match="no Ray cluster answers"):
        train(recipe)
    assert newest(recipe) == earlier
    assert list((tmp_path / "runs").iterdir()) == [earlier]


def test_a_folder_that_was_there_keeps_what_it_held_and_holds_no_run(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    monkeypatch.setattr(module, "connect", no_cluster)
    with pytest.raises(ValueError, match="no Ray cluster answers"):
        train(recipe, run_folder=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_controller_that_cannot_begin(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has written by then goes too."""

    @contextmanager
    def connected(*_: object, **__: object) -> Iterator[None]:
        yield

    class Failing:
        def __init__(self, _: object, settings: Any, *, detached: bool) -> None:
            (Path(settings.folder) / "checkpoints").mkdir()

        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *_: object) -> None:
            assert (tmp_path / "new" / "run.json").exists(), "removed while the controller may still write"

        def metrics_port(self) -> int:
            raise ValueError("metrics.port is taken")

    monkeypatch.setattr(module, "connect", connected)
    monkeypatch.setattr(module, "gcs_address", lambda: "nowhere")
    monkeypatch.setattr(module, "RayRun", Failing)
    with pytest.raises(ValueError, match=re.escape("metrics.port is taken")):
        train(recipe, run_folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_run_that_is_gone_on_with_stays(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = begun_before(tmp_path, recipe)
    monkeypatch.setattr(module, "connect", no_cluster)
    with pytest.raises(ValueError, match="no Ray cluster answers"):
        train(recipe, resume=True)
    assert (earlier / "run.json").exists()


def test_a_run_found_by_its_name_has_a_path_that_holds_on_other_machines(
    tmp_path: Path, recipe: Recipe
) -> None:
    """Workers are told where the checkpoints are, and a cluster's have a working directory of their own."""
    begun_before(tmp_path, recipe)
    assert newest(recipe).is_absolute()
