"""What every test shares: one compute thread, and a cache that is thrown away."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.support.cores import Claim

# Ray takes up a process's mode once, and a cluster that it starts later would have the default one
os.environ["RAY_AUTH_MODE"] = "disabled"
# What a test does with Ray is of no use to anybody, and an actor that would tell it takes seconds to start
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
CLAIM = Claim(CORES)

settings.register_profile("untimed", deadline=None)  # speed is measured in benches, never asserted here
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--apiserver", type=Path, help="a folder with kube-apiserver and etcd, to test autoscaling against"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray come first: whoever shares the files out must not be left with a long one."""
    on_ray = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in on_ray)


def pytest_configure() -> None:
    gc.disable()
    torch.set_num_threads(1)  # for what modules and sessions share, which is made before ``one_thread``


def pytest_collection_finish() -> None:
    """What all tests import stays: to look for garbage in it again and again finds none and takes time."""
    gc.enable()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Each test process keeps to a core, of its own where one is free, while a run's workers are threads of
    it, which hand one lock on to each other: across cores that takes a third more processor time. Clusters
    have all cores."""
    number = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if not CORES or not number:
        return
    if item.get_closest_marker("ray") is not None:
        CLAIM.give_back()
        os.sched_setaffinity(0, CORES)
    else:
        own = CLAIM.take()
        os.sched_setaffinity(0, {CORES[int(number) % len(CORES)] if own is None else own})


def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    if nextitem is None:
        CLAIM.give_back()


@pytest.fixture(scope="session", autouse=True)
def temporary_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tokenised text goes to a temporary folder, also in processes that a test starts."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("REKNIT_CACHE")
    os.environ["REKNIT_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["REKNIT_CACHE"]
    else:
        os.environ["REKNIT_CACHE"] = before


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Bits may depend on the thread count, so no test inherits the machine's or a neighbour's."""
    torch.set_num_threads(1)
