"""Multimodal micro-batches: what is in them, that they are pure, and that training on them learns."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.data.augment import Augmentation, augmented
from jobs.data.curated import open_set
from jobs.data.media import decode_pixels
from jobs.data.multimodal import MultimodalData, build
from jobs.models import captioner
from jobs.models.gpt import IGNORED
from runtime.samples import count
from runtime.streams import stream_key
from tests.support.captions import COUNTS, RATE, SIZE, write_set
from tests.support.chaos import ChaosRun
from tests.support.cluster import toy_job
from tests.support.expected import reference_bits

SHAPE: dict[str, Any] = {"context": 24, "slots": 3, "micro_batch_size": 2, "micro_batches": 4, "seed": 9}
AUGMENTED: dict[str, Any] = {"crop": 0.3, "jitter": 0.2, "flip": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("curated"))


def data(folder: Path, **changes: Any) -> MultimodalData:
    return build(source=str(folder), **{**SHAPE, **changes})


def equal(one: Any, two: Any) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_rows_hold_what_the_set_holds(folder: Path) -> None:
    curated = open_set(folder)
    table = curated.table("train").to_pylist()
    tokenizer = curated.tokenizer
    feed = data(folder, audio=True, audio_seconds=0.16)
    seen = []
    for step in range(1, 4):
        for micro_batch in range(4):
            inputs, targets_BT = feed.micro_batch(step, micro_batch)
            assert inputs["image"].shape == (2, 3, SIZE, SIZE, 3) and targets_BT.shape == (2, 24)
            for b, row in enumerate(feed.order.rows(step, micro_batch)):
                for slot, sample in enumerate(row.samples):
                    expected = table[sample]
                    here = inputs["segment"][b] == slot
                    text = inputs["tokens"][b][here].tolist()
                    assert text == [tokenizer.language(expected["language"]), *expected["tokens"]]
                    assert targets_BT[b][here].tolist() == [*expected["tokens"], tokenizer.end]
                    assert inputs["position"][b][here].tolist() == list(range(len(text)))
                    assert bool(inputs["has_image"][b, slot]) == (expected["image"] is not None)
                    if expected["image"] is not None:
                        assert np.array_equal(inputs["image"][b, slot], decode_pixels(expected["image"]))
                    assert bool(inputs["has_audio"][b, slot]) == (expected["audio"] is not None)
                    if expected["audio"] is not None:
                        clip = np.frombuffer(expected["audio"], "<i2")[: round(0.16 * RATE)]
                        assert np.array_equal(inputs["audio"][b, slot, : len(clip)], clip)
                    seen.append((row.epoch, sample))
                padding = inputs["segment"][b] == -1
                assert (targets_BT[b][padding] == IGNORED).all()
    assert len(seen) == len(set(seen)) > sum(COUNTS["train"])


def test_each_side_alone_is_the_same_and_names_its_samples(folder: Path) -> None:
    feed = data(folder, **AUGMENTED)
    for step in (1, 5):
        for micro_batch in range(4):
            inputs, targets = feed.inputs(step, micro_batch), feed.targets(step, micro_batch)
            both = feed.micro_batch(step, micro_batch)
            assert equal(inputs.value, both[0]) and torch.equal(targets.value, both[1])
            assert inputs.samples == targets.samples
            rows = feed.order.rows(step, micro_batch)
            assert count(inputs.samples) == sum(len(row.samples) for row in rows)


@pytest.mark.parametrize("memory_mb", [0, 256])
def test_the_bits_depend_on_nothing_but_the_place(folder: Path, memory_mb: int) -> None:
    """Neither on what was read before, nor on whether the set is kept in memory."""
    one, two = data(folder, **AUGMENTED), data(folder, **AUGMENTED, memory_mb=memory_mb)
    places = [(step, micro_batch) for step in (1, 2, 9) for micro_batch in range(4)]
    expected = {place: one.micro_batch(*place)[0] for place in places}
    for place in reversed(places):
        assert equal(two.micro_batch(*place)[0], expected[place])
    other = data(folder, **AUGMENTED, seed=10)
    assert not equal(other.micro_batch(1, 0)[0], expected[1, 0])


def test_augmentation_differs_by_epoch_and_sample() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    how = Augmentation(0.3, 0.2, True)
    first = augmented(pixels, how, 1, 0, 0)
    assert first.shape == pixels.shape and first.dtype == np.uint8
    assert np.array_equal(first, augmented(pixels, how, 1, 0, 0))
    others = [augmented(pixels, how, *place) for place in ((1, 0, 1), (1, 1, 0), (2, 0, 0))]
    assert not any(np.array_equal(first, other) for other in others)
    assert np.array_equal(augmented(pixels, Augmentation(), 1, 0, 0), pixels)
    flips = {augmented(pixels, Augmentation(flip=True), 1, 0, n).tobytes() for n in range(20)}
    assert flips == {pixels.tobytes(), pixels[:, ::-1].tobytes()}


@pytest.mark.parametrize("jitter", [0.2, 0.95])
def test_jitter_is_that_of_every_pixel_by_itself(jitter: float) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    key = stream_key("augment", 1, 2, 3)
    draws = np.random.Generator(np.random.Philox(key)).random(8)
    colours = 1.0 + jitter * (2.0 * draws[4:7] - 1.0)
    contrast = 1.0 + jitter * (2.0 * float(draws[7]) - 1.0)
    expected = np.rint(np.clip(((pixels - 127.5) * contrast + 127.5) * colours, 0.0, 255.0))
    found = augmented(pixels, Augmentation(jitter=jitter), 1, 2, 3)
    assert found.flags.c_contiguous and np.array_equal(found, expected)


def test_held_out_is_fixed_plain_and_apart(folder: Path) -> None:
    one, two = data(folder, **AUGMENTED), data(folder, seed=77)
    for micro_batch in range(3):
        inputs, targets_BT = one.held_out(micro_batch)
        assert equal(inputs, two.held_out(micro_batch)[0])
        assert torch.equal(targets_BT, two.held_out(micro_batch)[1])
    assert one.held_out_samples == sum(COUNTS["held_out"])


def test_without_images(folder: Path) -> None:
    blind = data(folder, images=False)
    inputs, targets_BT = blind.micro_batch(1, 0)
    seeing = data(folder).micro_batch(1, 0)
    assert not inputs["has_image"].any() and not inputs["image"].any()
    assert torch.equal(inputs["tokens"], seeing[0]["tokens"]) and torch.equal(targets_BT, seeing[1])


@pytest.mark.parametrize("memory_mb", [0, 256])
def test_some_languages_only(folder: Path, memory_mb: int) -> None:
    table = [row for row in open_set(folder).table("train").to_pylist() if row["language"] in ("de", "fr")]
    feed = data(folder, languages=["fr", "de"], memory_mb=memory_mb)
    assert feed.samples == feed.epoch_samples == len(table) == 25
    inputs, targets_BT = feed.micro_batch(1, 0)
    for b, row in enumerate(feed.order.rows(1, 0)):
        for slot, sample in enumerate(row.samples):
            here = inputs["segment"][b] == slot
            assert targets_BT[b][here].tolist()[:-1] == table[sample]["tokens"]
            if table[sample]["image"] is not None:
                assert np.array_equal(inputs["image"][b, slot], decode_pixels(table[sample]["image"]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"languages": ["tlh"]}, "tlh"),
        ({"context": 3}, "context"),
        ({"slots": 0}, "slots"),
        ({"crop": 1.0}, "crop"),
    ],
)
def test_mistakes(folder: Path, changes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        data(folder, **changes)


@pytest.mark.parametrize("files", [(), (0,)], ids=["no file", "a file without rows"])
def test_a_set_that_holds_nothing_out_can_be_trained_on(
    folder: Path, tmp_path: Path, files: tuple[int, ...]
) -> None:
    feed = data(write_set(tmp_path, {"train": COUNTS["train"], "held_out": files}))
    assert feed.held_out_samples == 0
    inputs, targets_BT = feed.micro_batch(1, 0)
    expected, same_BT = data(folder).micro_batch(1, 0)
    assert equal(inputs, expected) and torch.equal(targets_BT, same_BT)
    with pytest.raises(ValueError, match="nothing is held out"):
        feed.held_out(0)


def test_a_set_without_captions_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no rows: curate more data"):
        data(write_set(tmp_path, {"train": (), "held_out": (7,)}))


def test_a_folder_without_a_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json"):
        data(tmp_path)


@pytest.mark.parametrize(("workers", "stages"), [(1, 1), (3, 2), (4, 3)])
def test_workers_train_the_captioner_to_the_bits_of_one_process(
    folder: Path, tmp_path: Path, workers: int, stages: int
) -> None:
    model = partial(
        captioner.build,
        image_size=SIZE,
        patch=8,
        width=16,
        depth_image=1,
        depth_text=1,
        heads=2,
        vocabulary=open_set(folder).tokenizer.vocabulary,
        context=24,
        audio=True,
        audio_rate=RATE,
        audio_seconds=0.16,
        mels=8,
    )
    feed = partial(data, folder, audio=True, audio_seconds=0.16, **AUGMENTED)
    job = toy_job(tmp_path, steps=3, micro_batches=4, build_model=model, build_data=feed)
    result = ChaosRun(job, tmp_path, workers, stages).run()
    assert result.outcome == "completed", result.message
    assert result.bits == reference_bits(3, build_model=model, data=feed(), micro_batches=4)
