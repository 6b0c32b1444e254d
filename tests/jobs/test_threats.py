"""The table of threats names tests that there are, and what listens listens to this machine alone."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from jobs import cli, cli_watch
from jobs.recipe.recipe import Metrics as MetricsSection
from jobs.serve import serve
from runtime.metrics import Metrics

ROOT = Path(__file__).parent.parent.parent


def rows() -> list[list[str]]:
    table = (ROOT / "README.md").read_text().split("\n## Safety\n")[1].split("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return cells[2:]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_threat_has_tests(row: list[str]) -> None:
    _, _, tests = row
    named = re.findall(r"`([^`]+)`", tests)
    assert named
    for path, _, test in (name.partition("::") for name in named):
        functions = [
            each.name
            for each in ast.parse((ROOT / path).read_text()).body
            if isinstance(each, ast.FunctionDef) and each.name.startswith("test_")
        ]
        assert test in functions if test else functions


def test_what_listens_listens_to_this_machine_alone() -> None:
    assert MetricsSection().host == "127.0.0.1"
    for listens in (serve, cli.serve, cli_watch.dashboard, Metrics.serve):
        assert inspect.signature(listens).parameters["host"].default == "127.0.0.1", listens
