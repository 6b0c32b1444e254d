"""The C library keeps freed memory once it was asked to; what is imported is no garbage."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from runtime.allocator import without_garbage

PROGRAM = """
import resource
import torch
from runtime.allocator import keep_freed_memory

if keep_freed_memory():
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(1 << 20) for _ in range(8)]
        del tensors
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(faults)
"""


def test_pages_of_freed_tensors_are_not_faulted_in_again() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    if not result.stdout:
        pytest.skip("this C library has no mallopt")
    # 8 tensors of 4 MiB are 8192 pages
    assert int(result.stdout) < 512


def test_garbage_is_looked_for_afterwards_but_not_among_what_was_there() -> None:
    before = gc.get_freeze_count()
    with without_garbage():
        assert not gc.isenabled()
    try:
        assert gc.isenabled() and gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
