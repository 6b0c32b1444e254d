from __future__ import annotations

import datetime
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs
from safetensors.torch import load_file
from torch import Tensor

from runtime.checkpoint import (
    MANIFEST,
    CheckpointDamaged,
    CheckpointReader,
    Interval,
    Manifest,
    discard_after,
    folder_name,
    layout_digest,
    list_checkpoints,
    load_manifest,
    newest_whole,
    prune,
    write_manifest,
    write_shards,
)
from runtime.layout import Block, Layout, TensorSpec
from runtime.storage import Root, Store

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = (256, 64, 448)


def layout_of(sizes: tuple[int, ...] = SIZES, name: str = "weight") -> Layout:
    blocks = tuple(
        Block(k, f"layer{k}", (k,), (TensorSpec(k, name, (size - 3,), 0, True),), size)
        for k, size in enumerate(sizes)
    )
    return Layout(len(blocks), blocks, ())


def state_of(block: int, version: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * version + block)
    return torch.randn(3, SIZES[block], generator=generator)


def cut(cuts: Mapping[int, list[int]]) -> list[Interval]:
    pieces = []
    for block, size in enumerate(SIZES):
        edges = [0, *sorted(set(cuts.get(block, []))), size]
        pieces += [(block, a, b) for a, b in pairwise(edges)]
    return pieces


def write(root: Root, version: int, pieces: list[Interval], workers: int = 3) -> Manifest:
    files = []
    for worker in range(workers):
        mine = {(b, s, e): state_of(b, version)[:, s:e] for b, s, e in pieces[worker::workers]}
        files.append(write_shards(root, version, worker, 7, mine))
    return write_manifest(
        root, version, layout_of(), files, exponents=[3, -4, 100], recipe="abc", extra={"seed": 1}
    )


HALVES = cut({0: [128], 2: [64, 320]})


def assert_whole(root: Root, version: int, problems: int = 0) -> list[str]:
    manifest, found = newest_whole(root, layout_of())
    assert manifest is not None and manifest.version == version
    assert len(found) == problems, found
    with CheckpointReader(root, manifest) as reader:
        for block, size in enumerate(SIZES):
            assert torch.equal(reader.read_state(block, 0, size), state_of(block, version))
    return found


@pytest.fixture(params=["path", "uri", "subtree", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    if request.param == "memory":
        return Store(fs._MockFileSystem(datetime.datetime(2026, 1, 1)), "bucket/run/checkpoints")
    if request.param == "subtree":
        return Store(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "checkpoints")
    return (tmp_path / "checkpoints").as_uri() if request.param == "uri" else tmp_path / "checkpoints"


def test_round_trip_on_any_filesystem(root: Root) -> None:
    assert newest_whole(root, layout_of()) == (None, [])
    assert list_checkpoints(root) == []
    written = write(root, 40, HALVES)
    assert load_manifest(root, 40) == written
    assert written.exponents == (3, -4, 100) and written.extra == {"seed": 1} and written.recipe == "abc"
    write(root, 60, cut({1: [10]}))
    assert list_checkpoints(root) == [40, 60]
    assert_whole(root, 60)
    assert prune(root, 1) == [40]
    assert list_checkpoints(root) == [60]
    names = {info.base_name for info in Store.open(root).children(folder_name(60))}
    assert names == {MANIFEST, *(f"worker-{worker}-g7.safetensors" for worker in range(3))}


@settings(max_examples=30)
@given(st.dictionaries(st.integers(0, 2), st.lists(st.integers(1, 63), max_size=4)), st.data())
def test_any_slice_can_be_read_however_the_files_were_cut(
    cuts: dict[int, list[int]], data: st.DataObject
) -> None:
    store = Store(fs._MockFileSystem(datetime.datetime(2026, 1, 1)), "run")
    manifest = write(store, 5, cut(cuts), workers=data.draw(st.integers(1, 4)))
    with CheckpointReader(store, manifest) as reader:
        for block, size in enumerate(SIZES):
            start = data.draw(st.integers(0, size - 1))
            stop = data.draw(st.integers(start + 1, size))
            assert torch.equal(reader.read_state(block, start, stop), state_of(block, 5)[:, start:stop])


def test_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    # Larger than a chunk of the writer, and a slice that is not contiguous in memory.
    big = torch.randn(3, 1_000_003)
    file = write_shards(tmp_path, 1, 0, 0, {(0, 0, 1_000_000): big[:, 3:], (1, 64, 128): big[:, :64]})
    path = tmp_path / folder_name(1) / file.name
    assert path.stat().st_size == file.bytes
    loaded = load_file(path)
    assert loaded.keys() == {"0.0.1000000", "1.64.128"}
    assert torch.equal(loaded["0.0.1000000"], big[:, 3:]) and torch.equal(loaded["1.64.128"], big[:, :64])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SHARD = "worker-1-g7.safetensors"


@pytest.mark.parametrize(
    ("name", "damage", "cause"),
    [
        (SHARD, truncate, "bytes instead of"),
        (SHARD, flip, "does not match its checksum"),
        (SHARD, Path.unlink, "is missing"),
        (MANIFEST, truncate, "cannot be read"),
        (MANIFEST, Path.unlink, "is missing: the checkpoint was not finished"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, name: str, damage: Callable[[Path], None], cause: str
) -> None:
    for version in (20, 40, 60):
        write(tmp_path, version, HALVES)
    intact = load_manifest(tmp_path, 60)
    damage(tmp_path / folder_name(60) / name)
    (problem,) = assert_whole(tmp_path, 40, problems=1)
    assert cause in problem and str(tmp_path / folder_name(60) / name) in problem
    if name == SHARD:
        with CheckpointReader(tmp_path, intact) as reader, pytest.raises(CheckpointDamaged, match=cause):
            for block, size in enumerate(SIZES):
                reader.read_state(block, 0, size)
    # The newest whole one stays although a newer one is there by name.
    prune(tmp_path, 1)
    assert_whole(tmp_path, 40, problems=1)


def test_a_manifest_with_one_altered_exponent_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 20, HALVES)
    write(tmp_path, 40, HALVES)
    path = tmp_path / folder_name(40) / MANIFEST
    path.write_text(path.read_text().replace("-4", "-5"))
    (problem,) = assert_whole(tmp_path, 20, problems=1)
    assert problem == f"{path} does not match its checksum."


def test_a_manifest_can_be_taken_without_reading_the_files_back(tmp_path: Path) -> None:
    """Whoever reads a file finds what is wrong with it then."""
    write(tmp_path, 10, HALVES)
    newest = write(tmp_path, 20, HALVES)
    (tmp_path / folder_name(20) / newest.files[0].name).write_bytes(b"rotten")
    (tmp_path / folder_name(30)).mkdir()
    manifest, problems = newest_whole(tmp_path, layout_of(), read_back=False)
    assert manifest == newest and len(problems) == 1 and "was not finished" in problems[0]
    with CheckpointReader(tmp_path, newest) as reader, pytest.raises(CheckpointDamaged, match="instead of"):
        for block, size in enumerate(SIZES):
            reader.read_state(block, 0, size)


def test_keep_never_deletes_the_newest_whole(tmp_path: Path) -> None:
    for version in (10, 20, 30, 40, 50):
        write(tmp_path, version, HALVES)
    for version in (40, 50):
        flip(tmp_path / folder_name(version) / SHARD)
    abandoned = tmp_path / folder_name(15)
    write_shards(tmp_path, 15, 0, 0, {(0, 0, 64): torch.zeros(3, 64)})
    in_the_making = write_shards(tmp_path, 60, 0, 0, {(0, 0, 64): torch.zeros(3, 64)})
    stray = tmp_path / folder_name(30) / ".worker-9-g0.safetensors.0123abcd.tmp"
    stray.write_bytes(b"half")
    assert prune(tmp_path, 2) == [10]
    assert list_checkpoints(tmp_path) == [20, 30, 40, 50]
    assert not abandoned.exists() and not stray.exists()
    assert (tmp_path / folder_name(60) / in_the_making.name).exists()
    assert_whole(tmp_path, 30, problems=3)
    assert prune(tmp_path, 1) == [20]


def test_nothing_is_deleted_where_nothing_is_whole(tmp_path: Path) -> None:
    for version in (10, 20):
        write(tmp_path, version, HALVES)
        truncate(tmp_path / folder_name(version) / SHARD)
    assert prune(tmp_path, 1) == []
    assert list_checkpoints(tmp_path) == [10, 20]


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="shape"):
        write_shards(tmp_path, 1, 0, 0, {(0, 0, 64): torch.zeros(3, 64), (1, 0, 64): torch.zeros(3, 65)})
    assert list((tmp_path / folder_name(1)).iterdir()) == []


@pytest.mark.parametrize(
    "pieces",
    [
        [p for p in HALVES if p != (2, 64, 320)],
        [p for p in HALVES if p[0] != 1],
        [p for p in HALVES if p != (2, 320, 448)],
        [*HALVES, (0, 64, 128)],
    ],
    ids=["gap", "block", "end", "overlap"],
)
def test_files_that_do_not_hold_every_element_once_are_refused(
    tmp_path: Path, pieces: list[Interval]
) -> None:
    with pytest.raises(AssertionError, match="layer"):
        write(tmp_path, 1, pieces)
    assert list_checkpoints(tmp_path) == []


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    pieces = {(b, 0, size): state_of(b, 1) for b, size in enumerate(SIZES)}
    file = write_shards(tmp_path / "other machine", 1, 0, 0, pieces)
    with pytest.raises(ValueError, match="all machines share"):
        write_manifest(tmp_path, 1, layout_of(), [file], exponents=None, recipe="abc")


def test_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 20, HALVES)
    assert layout_digest(layout_of()) == layout_digest(layout_of())
    for other in (layout_of((256, 64, 512)), layout_of(SIZES[:2]), layout_of(name="bias")):
        with pytest.raises(ValueError, match="was written by another model"):
            newest_whole(tmp_path, other)


def test_an_unknown_filesystem_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="give a local path or an s3:// or gs:// address"):
        Store.open("nowhere://bucket/run")


def test_a_store_and_a_manifest_can_be_sent(tmp_path: Path) -> None:
    manifest = write(Store.open(tmp_path), 1, HALVES)
    store, copy = pickle.loads(pickle.dumps((Store.open(tmp_path), manifest)))
    assert copy == manifest
    assert_whole(store, 1)


CHILD = """
import sys
from collections.abc import Mapping
import torch
from runtime.checkpoint import write_shards
from runtime.storage import Store

root, moment = sys.argv[1:]

class Stuck(Mapping):
    "Two large slices; says when the second is asked for and then never gives it."
    keys_ = [(0, 0, 1_000_000), (1, 0, 1_000_000)]
    def __iter__(self): return iter(self.keys_)
    def __len__(self): return 2
    def __getitem__(self, key):
        if key[0] == 1:
            print("now", flush=True)
            sys.stdin.read()
        return torch.ones(3, 1_000_000)

if moment == "shard":
    write_shards(root, 40, 0, 0, Stuck())
else:
    for worker in range(3):
        write_shards(root, 40, worker, 0, {(worker, 0, 64): torch.ones(3, 64)})
    with Store.open(root).publish("step-00000040", "manifest.json") as stream:
        stream.write(b'{"sha256": ')
        print("now", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("moment", ["shard", "manifest"])
def test_kill_while_writing_leaves_the_previous_checkpoint(tmp_path: Path, moment: str) -> None:
    write(tmp_path, 20, HALVES)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path), moment],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        assert child.stdout.readline() == "now\n"
    finally:
        child.kill()
        child.stdin.close()
        child.stdout.close()
        assert child.wait() == -signal.SIGKILL
    (half,) = (tmp_path / folder_name(40)).glob(".*.tmp")
    assert half.stat().st_size > 0
    (problem,) = assert_whole(tmp_path, 20, problems=1)
    assert "was not finished" in problem
    assert list_checkpoints(tmp_path) == [20]
    # The run that goes on writes the same step again, and the next but one cleans up.
    write(tmp_path, 40, HALVES)
    assert_whole(tmp_path, 40)
    assert prune(tmp_path, 1) == [20]
    assert not half.exists()
    assert_whole(tmp_path, 40)


def test_damaged_newer_checkpoints_are_discarded_before_pruning(tmp_path: Path) -> None:
    for version in (10, 20, 30):
        write(tmp_path, version, HALVES)
    (tmp_path / folder_name(40)).mkdir()
    assert discard_after(tmp_path, 20) == [30, 40]
    write(tmp_path, 25, HALVES)
    assert prune(tmp_path, 1, read_back=False) == [10, 20]
    assert_whole(tmp_path, 25)
