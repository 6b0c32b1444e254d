"""DeepSpeed inside a test's own process: a world of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def alone() -> Iterator[None]:
    """Skips the test where DeepSpeed is not installed."""
    pytest.importorskip("deepspeed")
    from actors.engines.group import Group, prepare_deepspeed
    from runtime.settings import be_local_rank

    prepare_deepspeed()
    be_local_rank(0)
    group = Group(torch.device("cpu"))
    group.form_alone()
    try:
        yield
    finally:
        group.leave()
