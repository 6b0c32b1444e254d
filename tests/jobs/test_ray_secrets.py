"""A run on a cluster that asks for tokens: who has none is refused, and secrets are to be seen nowhere."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.recipe.recipe import load_recipe
from tests.support.ray_jobs import recipe_bits

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    known = {"RAY_AUTH_TOKEN": secrets.token_hex(32), "REKNIT_FABRIC_SECRET": secrets.token_hex(32)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.secured", str(tmp_path_factory.mktemp("secured"))],
        env={**os.environ, **known, "RAY_AUTH_MODE": "token"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_with_token_and_secret_a_run_is_as_ever(outcome: dict[str, object]) -> None:
    recipe = load_recipe(Path(str(outcome["recipe"])))
    assert outcome["exit_code"] == 0
    assert outcome["bits"] == [list(bits) for bits in recipe_bits(recipe)]


@pytest.mark.parametrize("token", ["none", "wrong"])
def test_without_the_token_nothing_is_told(outcome: dict[str, object], token: str) -> None:
    strangers = outcome["strangers"]
    assert isinstance(strangers, dict)
    code, told = strangers[token]
    assert code == 2 and "asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in told


def test_secrets_are_in_no_command_line_log_or_record(outcome: dict[str, object]) -> None:
    assert outcome["looked_at"] and outcome["command_lines"] == [] and outcome["files"] == []
