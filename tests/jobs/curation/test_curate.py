"""``reknit curate`` on real files and real Ray: the same bits from any number of workers; kills."""

from __future__ import annotations

import csv
import io
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import WorkerCrashedError
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli import app
from jobs.curate import curate
from jobs.curation.examine import examine_table
from jobs.curation.items import Unit, item_table
from jobs.curation.pipeline import OnProgress
from jobs.curation.recipe import CurationRecipe, load_curation
from jobs.curation.sources import list_units, read_unit
from jobs.curation.work import Work, work_key
from jobs.data.curated import open_set
from jobs.data.media import decode_image, decode_pixels, decode_samples, fit_image
from runtime.storage import Store
from tests.support.media import picture_file
from tests.support.raw import DROPPED, GOOD, put, raw_folder, raw_recipe
from tests.support.ray_cluster import local_ray
from tests.support.ray_jobs import TOKEN, descendants, wait_until

ROOT = Path(__file__).parents[3]
WORKERS = (1, 2, 4)

# several starts of Ray with many imports each, on a machine that may have more to do
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return raw_folder(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Begins with one worker."""
    with local_ray(1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def sets(cluster: Cluster, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The set as made by a Ray cluster that grows from one size to the next."""
    folder = tmp_path_factory.mktemp("sets")
    made = {}
    for workers in WORKERS:
        if more := workers - int(ray.cluster_resources()["CPU"]):
            cluster.add_node(num_cpus=more)
        assert ray.cluster_resources()["CPU"] == workers
        made[workers] = folder / f"by-{workers}"
        recipe = raw_recipe(folder / f"{workers}.toml", raw, made[workers])
        curate(recipe, console=Console(file=io.StringIO()))
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.ray
def test_same_bits_from_any_number_of_workers(sets: dict[int, Path]) -> None:
    first = contents(sets[1])
    assert {"manifest.json", "tokenizer.json", "report.html", "dropped.csv"} <= first.keys()
    assert "train-00000-of-00004.parquet" in first and "held_out-00000-of-00001.parquet" in first
    for workers in WORKERS[1:]:
        assert contents(sets[workers]) == first
    assert not [name for name in os.listdir(sets[1]) if name.startswith(".work")]


@pytest.mark.ray
def test_every_bad_item_is_dropped_by_its_filter_and_listed(sets: dict[int, Path]) -> None:
    listed = list(csv.DictReader((sets[1] / "dropped.csv").open(encoding="utf-8", newline="")))
    rows = {row["name"].partition(":")[0]: row["filter"] for row in listed if row["what"] == "row"}
    assert rows == DROPPED
    assert {(row["name"], row["filter"]) for row in listed if row["what"] == "clip"} == {
        ("a/00:fr", "silence"),
        ("a/03:fr", "clip"),
    }
    likes = {row["name"]: row["like"] for row in listed if row["like"]}
    assert likes == {"twice/copy:en": "b/04", "twice/nearly:en": "c/05", "twice/saying:en": "b/07:en"}
    manifest = open_set(sets[1]).manifest
    counted = sum(drop.count for drop in manifest.drops if drop.what == "rows")
    assert counted == len(DROPPED) and manifest.read == 2 * GOOD + len(DROPPED)


@pytest.mark.ray
def test_rows_hold_what_the_files_held(sets: dict[int, Path], raw: Path) -> None:
    curated = open_set(sets[1])
    curated.check()
    rows = [row for split in curated.splits for row in curated.table(split).to_pylist()]
    assert len({row["sample"] for row in rows}) == len(rows) == 2 * GOOD
    for row in rows:
        number = int(row["item"].rpartition("/")[2])
        words = {"en": f"picture number {number}", "fr": f"l'image num\u00e9ro {number}"}
        assert row["caption"] == words[row["language"]]
        assert curated.tokenizer.decode(row["tokens"]) == row["caption"]
        assert row["category"] == "abc"[number % 3] and (row["width"], row["height"]) == (96, 80)
        original = decode_image((raw / f"{row['item']}.png").read_bytes())
        assert (decode_pixels(row["image"]) == fit_image(original, 32)).all()
        spoken = number % 3 == 0 and row["language"] == "en"
        assert (row["audio"] is not None) == spoken
        if spoken:
            samples = decode_samples(row["audio"])
            assert len(samples) == 9_600 and np.abs(samples).max() > 10_000
    items = {split: {row["item"] for row in curated.table(split).to_pylist()} for split in curated.splits}
    assert not items["train"] & items["held_out"]
    assert len(items["held_out"]) == round(0.2 * GOOD)


@pytest.mark.ray
def test_finished_set_is_not_made_again(
    sets: dict[int, Path], raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*arguments: object) -> None:
        raise AssertionError("there is nothing to do for Ray")

    monkeypatch.setattr("jobs.curate.connect", connect)
    before = {path.name: path.stat().st_mtime_ns for path in sets[2].iterdir()}
    output = io.StringIO()
    curate(raw_recipe(tmp_path / "again.toml", raw, sets[2]), console=Console(file=output))
    assert "is there already" in output.getvalue()
    assert {path.name: path.stat().st_mtime_ns for path in sets[2].iterdir()} == before


@pytest.mark.ray
def test_killed_run_goes_on_where_it_was(tmp_path: Path, cluster: Cluster) -> None:
    source = tmp_path / "raw"
    for number in range(96):
        put(source, f"{number:03d}.png", picture_file(number, 500, 400))
        put(source, f"{number:03d}.txt", f"picture number {number}")
    recipe = raw_recipe(tmp_path / "kill.toml", source, tmp_path / "set")
    checked = load_curation(recipe)
    work = Work(Store.open(checked.set.folder), work_key(checked, list_units(checked)))
    kept = Path(work.store.at(work.folder))
    token = secrets.token_hex(8)
    child = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "curate", str(recipe), "--workers", "1"],
        cwd=ROOT,
        env={**os.environ, TOKEN: token},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: list(kept.glob("examined-*")), "the first file of examined items", interval=0.002)
    finally:
        for process in (child.pid, *descendants(token)):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        child.wait()
    wait_until(lambda: not descendants(token), "all processes gone")
    assert not (tmp_path / "set" / "manifest.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in kept.glob("examined-*")}
    finished = work.finished_units()
    assert 0 < len(finished) < 96

    output = io.StringIO()
    seen: dict[str, int] = {}

    class Watched(Work):
        def finish(self, names: object) -> None:
            seen.update({path.name: path.stat().st_mtime_ns for path in kept.glob("examined-*")})
            super().finish(names)  # type: ignore[arg-type]

    whole = raw_recipe(tmp_path / "whole.toml", source, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.curate.Work", Watched)
        curate(recipe, console=Console(file=output))
    assert f"{len(finished)} of 96 units were read before" in output.getvalue()
    assert before.items() <= seen.items() and len(seen) > len(before)
    uri = (tmp_path / "whole").as_uri()
    curate(whole, [f"set.folder={uri}"], console=Console(file=io.StringIO()))
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_another_recipe_or_source_is_other_work(raw: Path, tmp_path: Path) -> None:
    recipe = raw_recipe(tmp_path / "a.toml", raw, tmp_path / "set")
    checked = load_curation(recipe)
    units = list_units(checked)
    key = work_key(checked, units)
    assert key == work_key(load_curation(recipe, ["set.folder=elsewhere"]), units)
    assert key != work_key(load_curation(recipe, ["image.aspect=2.0"]), units)
    assert key != work_key(checked, units[1:])


def examine_here(units: list[Unit], recipe: CurationRecipe, work: Work, progress: OnProgress) -> None:
    """What the first pipeline does, without Ray."""
    for unit in units:
        for number, item in enumerate(read_unit(unit, recipe)):
            work.keep(examine_table(item_table(unit.key, number, True, item), recipe))
        progress(1)


def test_nothing_left_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.curate.connect", lambda *arguments: nullcontext())
    monkeypatch.setattr("jobs.curate.examine_units", examine_here)
    put(tmp_path / "raw", "a.png", b"broken")
    put(tmp_path / "raw", "a.txt", "a caption")
    recipe = raw_recipe(tmp_path / "none.toml", tmp_path / "raw", tmp_path / "set")
    with pytest.raises(ValueError, match="nothing is left to train on: of 1 rows the filter image dropped 1"):
        curate(recipe, workers=1, console=Console(file=io.StringIO()))
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_failure_of_ray_is_told_in_one_sentence(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise WorkerCrashedError()

    monkeypatch.setattr("jobs.curate.connect", lambda *arguments: nullcontext())
    monkeypatch.setattr("jobs.curate.examine_units", fail)
    recipe = raw_recipe(tmp_path / "a.toml", raw, tmp_path / "set")
    done = CliRunner().invoke(app, ["curate", str(recipe)])
    assert done.exit_code == 1
    assert "reknit: the run failed: The worker died" in done.stderr and "start it again" in done.stderr


def test_mistakes_end_with_one_sentence_and_code_2(raw: Path, tmp_path: Path) -> None:
    recipe = raw_recipe(tmp_path / "a.toml", raw, tmp_path / "set")
    for arguments, says in (
        ([str(recipe), "--set", "source.path=/nowhere"], "there is no folder /nowhere"),
        ([str(recipe), "--workers", "0"], "--workers is 0"),
        ([str(tmp_path / "missing.toml")], "there is no such file"),
        ([str(recipe), "--set", "source.kind=tuxpaint", "--set", "source.path=/nowhere"], "Debian package"),
    ):
        done = CliRunner().invoke(app, ["curate", *arguments])
        assert done.exit_code == 2, done.output
        assert done.stderr.startswith("reknit: ") and says in done.stderr and done.stderr.count("\n") == 1
