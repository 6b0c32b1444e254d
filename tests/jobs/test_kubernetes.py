"""``reknit k8s render`` from the command line, and what it needs when it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.curation.recipe import load_curation
from jobs.kubernetes import SHIPPED, render
from jobs.pods import Machines
from jobs.recipe.recipe import load_recipe

ROOT = Path(__file__).parent.parent.parent
RECIPES = ROOT / "jobs" / "recipes"
IMAGE = "reknit:0.1.0"


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["k8s", "render", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def contents(folder: Path) -> dict[str, object]:
    """Files by name. A recipe is what it says: a key that Reknit has got since is not missing in it."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == "settings/train/recipe.toml":
            found[name] = load_recipe(path)
        elif name == "settings/curate/recipe.toml":
            found[name] = load_curation(path)
        elif path.is_file():
            found[name] = path.read_text()
    return found


def test_a_training_recipe_becomes_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    code, out, _ = run(RECIPES / "gpt-small.toml", "--image", IMAGE, "--output", target)
    assert code == 0
    assert out.splitlines() == [
        f"kubectl apply -k {target}/overlays/{each}" for each in ("cluster", "train", "serve")
    ]
    files = contents(target)
    assert files == {
        name: text
        for name, text in contents(SHIPPED).items()
        if name.startswith(
            (
                "base/",
                "dashboards/",
                "settings/train/",
                "overlays/cluster/",
                "overlays/train/",
                "overlays/serve/",
            )
        )
    }, "the shipped settings are not those that render makes of the recipe"


def test_a_curation_recipe_becomes_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    code, out, _ = run(RECIPES / "image-folder-curate.toml", "--image", IMAGE, "--output", target)
    assert (code, out) == (0, f"kubectl apply -k {target}/overlays/curate\n")
    assert contents(target) == {
        name: text
        for name, text in contents(SHIPPED).items()
        if name.startswith(("base/", "dashboards/", "settings/curate/", "overlays/curate/"))
    }


def test_rendered_again_it_is_what_the_new_arguments_say(tmp_path: Path) -> None:
    recipe, target = RECIPES / "gpt-small.toml", tmp_path / "out"
    render(recipe, Machines(IMAGE), ["checkpoint.folder=s3://bucket/x"], output=target)
    assert (target / "settings" / "train" / "egress.yaml").exists()
    (target / "overlays" / "mine").mkdir()
    (target / "overlays" / "mine" / "kustomization.yaml").write_text("resources: [../train]\n")
    render(recipe, Machines(IMAGE), output=target)
    assert not (target / "settings" / "train" / "egress.yaml").exists()
    assert (target / "overlays" / "mine" / "kustomization.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.toml", "--image", IMAGE], "there is no such file"),
        ([RECIPES / "gpt-small.toml", "--image", "reknit:latest"], "names no version"),
        ([RECIPES / "gpt-small.toml", "--image", IMAGE, "--set", "parallel.workers=0"], "parallel.workers"),
        ([RECIPES / "gpt-small.toml", "--image", IMAGE, "--set", "parallel.max_workers=3"], "smaller than"),
        ([RECIPES / "gpt-small.toml", "--image", IMAGE, "--reserved", "99"], "no use for more than 8 pods"),
        ([RECIPES / "gpt-small.toml", "--image", IMAGE, "--pods", "1", "2"], "--pods and --cpus are for"),
        ([RECIPES / "gpt-small.toml", "--image", IMAGE, "--namespace", "My Team"], "names no namespace"),
        ([RECIPES / "gpt-small.toml", "--image", IMAGE, "--spot-nodes", "spot"], "write it as key=value"),
        ([RECIPES / "image-folder-curate.toml", "--image", IMAGE, "--pods", "3", "2"], "from 3 to 2"),
        ([RECIPES / "image-folder-curate.toml", "--image", IMAGE, "--set", "set.image_size=1"], "image_size"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    arguments: list[str | Path], sentence: str, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    code, out, err = run(*arguments, "--output", target)
    assert code == 2
    assert out == ""
    assert sentence in err
    assert err.startswith("reknit: ")
    assert err.count("\n") == 1
    assert not target.exists()


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    code, _, err = run(RECIPES / "gpt-small.toml", "--image", IMAGE, "--output", tmp_path)
    assert code == 2
    assert "holds other things" in err
    assert contents(tmp_path) == {"letters.txt": "mine"}


@pytest.mark.parametrize(
    "theirs",
    [
        ("settings/app.yaml", "dashboards/sales.json"),
        ("settings/train/kustomization.yaml", "dashboards/sales.json"),
        ("settings/train/notes.txt",),
    ],
)
def test_a_project_with_folders_of_the_same_names_is_left_alone(
    theirs: tuple[str, ...], tmp_path: Path
) -> None:
    for name in theirs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine\n")
    code, _, err = run(RECIPES / "gpt-small.toml", "--image", IMAGE, "--output", tmp_path)
    assert code == 2
    assert "holds other things" in err
    assert contents(tmp_path) == dict.fromkeys(theirs, "mine\n")


@pytest.mark.parametrize("folder", ["settings/curate", "dashboards"])
def test_a_rendered_folder_loses_nothing_that_was_not_rendered(folder: str, tmp_path: Path) -> None:
    render(RECIPES / "gpt-small.toml", Machines(IMAGE), output=tmp_path)
    for path in (tmp_path / folder).glob("*"):
        path.unlink()
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    code, _, err = run(RECIPES / "image-folder-curate.toml", "--image", IMAGE, "--output", tmp_path)
    assert code == 2
    assert f"{folder} holds other things" in err
    assert contents(tmp_path) == before


def test_an_installed_package_has_the_manifests(tmp_path: Path) -> None:
    """The wheel that setuptools makes of a copy of the sources."""
    source = tmp_path / "source"
    ignore = [f"--exclude={each}" for each in (".git", ".venv", "__pycache__", "runs", "tests")]
    tarred = subprocess.run(["tar", "-C", str(ROOT), *ignore, "-c", "."], capture_output=True, check=True)
    source.mkdir()
    subprocess.run(["tar", "-C", str(source), "-x"], input=tarred.stdout, check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "."]
    done = subprocess.run([*build, "-w", str(tmp_path)], cwd=source, capture_output=True, text=True)
    if "setuptools" in done.stderr and "No module named" in done.stderr:
        pytest.skip("setuptools is not installed here, which makes the wheel")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    assert contents(tmp_path / "installed" / "k8s") == contents(SHIPPED)
    shown = subprocess.run(
        [
            sys.executable,
            "-m",
            "jobs.cli",
            "k8s",
            "render",
            str(RECIPES / "gpt-small.toml"),
            "--image",
            IMAGE,
        ],
        cwd=tmp_path / "installed",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert (tmp_path / "installed" / "deploy" / "gpt-small" / "base" / "train.sh").exists()


# What the job runs.


@pytest.mark.parametrize("there", [False, True])
def test_a_second_try_goes_on_with_the_run(there: bool, tmp_path: Path) -> None:
    folder, bin_folder = tmp_path / "run folder", tmp_path / "bin"
    folder.mkdir()
    bin_folder.mkdir()
    if there:
        (folder / "run.json").write_text("{}")
    command = bin_folder / "reknit"
    command.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    command.chmod(0o755)
    done = subprocess.run(
        ["bash", SHIPPED / "base" / "train.sh", folder],
        env={"PATH": f"{bin_folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = ["train", "/etc/reknit/recipe.toml", "--run-folder", str(folder)]
    expected += ["--set", "metrics.host=0.0.0.0", "--set", "metrics.port=9464"]
    assert done.stdout.splitlines() == expected + ["--resume"] * there
