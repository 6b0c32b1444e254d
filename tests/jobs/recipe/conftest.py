"""A recipe that is right."""

from __future__ import annotations

from pathlib import Path

import pytest

GOOD = """\
[run]
name = "good"
steps = 10
seed = 0

[model]
arguments = { width = 8 }

[optimizer]
learning_rate = 1

[parallel]
workers = 4
micro_batches = 8
micro_batch_size = 2
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "demo.toml"
    path.write_text(GOOD)
    return path
