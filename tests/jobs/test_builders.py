"""Builders that a recipe names."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.builders import load_builder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("json.dumps", '"json.dumps" does not name a builder: write "package.module:function".'),
        ("json:", '"json:" does not name a builder: write "package.module:function".'),
        ("nowhere.models:build", "nowhere.models:build: there is no module nowhere: install its package or "),
        (
            "json.nowhere:build",
            "json.nowhere:build: there is no module json.nowhere: install its package or ",
        ),
        ("json:build", "json:build: the module json has no build: name a function that it defines."),
        ("json:__name__", "json:__name__: __name__ is not callable: name a function that builds."),
    ],
)
def test_builder_that_cannot_be_loaded(name: str, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        load_builder(name)
    assert str(refusal.value).startswith(message)


def test_builder_whose_module_lacks_a_dependency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_needy_model.py").write_text("import a_package_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="a_package_nobody_has: it is imported by my_needy_model, so"):
        load_builder("my_needy_model:build")
