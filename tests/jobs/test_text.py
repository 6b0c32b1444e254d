"""Text data: tokenised once, the same everywhere, and nothing held out is trained on."""

from __future__ import annotations

import gzip
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.data.corpus import open_corpus
from jobs.data.text import TextData, build
from runtime.settings import cache_folder

BATCH: dict[str, Any] = {"context": 8, "micro_batch_size": 2, "micro_batches": 3, "seed": 5}


def random_text(length: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(1, 256, length, dtype=np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty documents of 500 to 690 bytes in four formats and two folders."""
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for index in range(20):
        suffix = ("txt", "gz", "dz", "py")[index % 4]
        text = random_text(500 + 10 * index, index)
        path = folder / ("deep" if index % 3 else ".") / f"{index}.{suffix}"
        path.write_bytes(gzip.compress(text) if suffix in ("gz", "dz") else text)
    (folder / "picture.png").write_bytes(b"not text")
    return folder


def text_data(source: Path, cache: Path, **changes: Any) -> TextData:
    return build(**{**BATCH, "source": str(source), "cache": cache, **changes})


def test_documents_are_whole_and_separated(folder: Path, tmp_path: Path) -> None:
    corpus = open_corpus(str(folder), tmp_path / "cache")
    stops = [*corpus.starts[1:], len(corpus.tokens)]
    documents = {bytes(corpus.tokens[a:b]) for a, b in zip(corpus.starts, stops, strict=True)}
    assert documents == {random_text(500 + 10 * index, index) + b"\0" for index in range(20)}


def test_a_copy_elsewhere_gives_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for path in sorted(folder.rglob("*.*"), reverse=True):
        copy = elsewhere / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    first = open_corpus(str(folder), tmp_path / "a")
    second = open_corpus(str(elsewhere), tmp_path / "b")
    assert first.digest == second.digest
    assert np.array_equal(first.tokens, second.tokens)


def test_tokenised_once_and_again_after_a_change(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = open_corpus(str(folder), cache)
    (entry,) = cache.iterdir()
    written = (entry / "tokens.bin").stat().st_mtime_ns
    open_corpus(str(folder), cache)
    assert [path.name for path in cache.iterdir()] == [entry.name]
    assert (entry / "tokens.bin").stat().st_mtime_ns == written
    (folder / "new.txt").write_text("one more document")
    assert open_corpus(str(folder), cache).digest != first.digest


def test_workers_that_start_together_agree(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(8) as pool:
        corpora = list(pool.map(lambda _: open_corpus(str(folder), cache), range(8)))
    assert len({corpus.digest for corpus in corpora}) == 1
    assert all(np.array_equal(corpus.tokens, corpora[0].tokens) for corpus in corpora)
    assert len(list(cache.iterdir())) == 1


def test_micro_batches_are_pure_and_shifted_by_one(folder: Path, tmp_path: Path) -> None:
    data, again = text_data(folder, tmp_path), text_data(folder, tmp_path)
    later = [data.micro_batch(step, m) for step in (9, 2) for m in (2, 0)]
    for (step, m), (inputs_BT, targets_BT) in zip([(9, 2), (9, 0), (2, 2), (2, 0)], later, strict=True):
        assert (inputs_BT.shape, inputs_BT.dtype, targets_BT.dtype) == ((2, 8), torch.int64, torch.int64)
        assert torch.equal(inputs_BT[:, 1:], targets_BT[:, :-1])
        assert torch.equal(again.micro_batch(step, m)[0], inputs_BT)
        assert torch.equal(again.micro_batch(step, m)[1], targets_BT)
    other = text_data(folder, tmp_path, seed=6)
    assert not torch.equal(other.micro_batch(2, 0)[0], data.micro_batch(2, 0)[0])


def test_an_epoch_has_each_sample_once_and_none_held_out(folder: Path, tmp_path: Path) -> None:
    data = text_data(folder, tmp_path, held_out_fraction=0.2)
    steps = data.samples // 6
    seen = [
        bytes(row.to(torch.uint8).numpy())
        for step in range(1, steps + 1)
        for m in range(3)
        for row in data.micro_batch(step, m)[0]
    ]
    # Random text: eight bytes do not come twice by chance.
    assert len(set(seen)) == len(seen) == steps * 6
    batches = range(data.held_out_samples // 2)
    held_out = [bytes(row.to(torch.uint8).numpy()) for m in batches for row in data.held_out(m)[0]]
    assert len(set(held_out)) == len(held_out) >= 0.08 * len(seen)
    assert not set(held_out) & set(seen)


def test_held_out_text_starts_at_a_document(folder: Path, tmp_path: Path) -> None:
    corpus = open_corpus(str(folder), tmp_path)
    data = text_data(folder, tmp_path, held_out_fraction=0.3)
    total = len(corpus.tokens)
    start = total - data.held_out_samples * 8 - 1
    boundary = min(int(s) for s in corpus.starts if s >= total - round(0.3 * total))
    assert 0 <= start - boundary < 8
    assert data.samples == (boundary - 1) // 8


def test_held_out_text_of_one_long_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(random_text(9_999))
    data = text_data(tmp_path / "book.txt", tmp_path / "cache", held_out_fraction=0.1)
    assert (data.samples, data.held_out_samples) == (8_999 // 8, 999 // 8)


def test_held_out_does_not_depend_on_the_seed(folder: Path, tmp_path: Path) -> None:
    first, second = text_data(folder, tmp_path), text_data(folder, tmp_path, seed=6)
    assert torch.equal(first.held_out(3)[0], second.held_out(3)[0])
    assert not torch.equal(first.held_out(3)[0], first.held_out(4)[0])


def test_standard_library_is_the_default() -> None:
    data = build(context=64, micro_batch_size=4, micro_batches=8, seed=1)
    assert (data.vocabulary, data.tokens_per_sample) == (256, 64)
    assert data.samples > 50_000
    inputs_BT, _ = data.micro_batch(1, 0)
    assert inputs_BT.float().mean() < 128  # Python sources are ASCII, nearly.
    assert any(cache_folder().glob("corpus-*/tokens.bin"))


def test_cache_folder_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REKNIT_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "reknit"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 0}, "context is 0: it must be at least 1"),
        ({"context": 5_000}, "making 2 samples of 5000, but one step takes 6: give more text"),
        ({"micro_batches": 5_000}, "one step takes 10000"),
        ({"held_out_fraction": 1.0}, "held_out_fraction is 1.0: it must be at least 0 and below 1"),
        ({"held_out_fraction": 0.0001}, "held-out text makes 0 samples, fewer than one micro-batch"),
    ],
)
def test_sizes_that_do_not_fit(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_data(folder, tmp_path, **changes)


def test_nothing_held_out(folder: Path, tmp_path: Path) -> None:
    data = text_data(folder, tmp_path, held_out_fraction=0.0)
    assert data.held_out_samples == 0
    with pytest.raises(ValueError, match="no text is held out: set the data's held_out_fraction above 0"):
        data.held_out(0)


def test_sources_that_give_no_text(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match='none does not exist: give a file, a folder or "python-stdlib"'):
        open_corpus(str(tmp_path / "none"), cache)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"bare holds no text: put files ending in \.txt"):
        open_corpus(str(tmp_path / "bare"), cache)
    (tmp_path / "bare" / "empty.txt").touch()
    with pytest.raises(ValueError, match="bare is empty: give a source with text in it"):
        open_corpus(str(tmp_path / "bare"), cache)
    whole = gzip.compress(random_text(5_000))
    for name, damaged in [("short.gz", whole[:-100]), ("flipped.gz", b"\0" + whole[1:])]:
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            open_corpus(str(tmp_path / name), cache)
    assert list(cache.iterdir()) == []
