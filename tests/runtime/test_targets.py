from __future__ import annotations

import fnmatch
import json
from pathlib import Path

import pytest

from runtime.targets import Kind, announce, pattern, target_file, withdraw


@pytest.mark.parametrize(
    ("host", "target"),
    [
        ("127.0.0.1", "127.0.0.1:9464"),
        ("0.0.0.0", "10.0.0.7:9464"),
        ("::", "10.0.0.7:9464"),
        ("fd00::1", "[fd00::1]:9464"),
    ],
)
def test_the_target_is_one_that_can_be_asked(tmp_path: Path, host: str, target: str) -> None:
    announce(tmp_path / "new", "train", "demo", host, 9464, address="10.0.0.7")
    (file,) = (tmp_path / "new").iterdir()
    assert json.loads(file.read_text()) == [{"targets": [target], "labels": {}}]


def test_each_kind_is_found_by_its_pattern(tmp_path: Path) -> None:
    kinds: tuple[Kind, ...] = ("train", "serve")
    for kind in kinds:
        announce(tmp_path, kind, "a run/7", "127.0.0.1", 1, address="")
    files = [str(file) for file in tmp_path.iterdir()]
    for kind in kinds:
        assert fnmatch.filter(files, pattern(tmp_path, kind)) == [str(target_file(tmp_path, kind, "a run/7"))]


def test_nothing_is_left_of_what_has_ended(tmp_path: Path) -> None:
    announce(tmp_path, "train", "one", "127.0.0.1", 1, address="")
    announce(tmp_path, "train", "two", "127.0.0.1", 2, address="")
    withdraw(tmp_path, "train", "one")
    withdraw(tmp_path, "train", "one")
    withdraw(tmp_path / "nowhere", "train", "one")
    assert [file.name for file in tmp_path.iterdir()] == ["train-two.json"]
