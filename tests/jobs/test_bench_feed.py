"""The bench of the feed: both sides train on the same shapes, of the same samples."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.assembly import build_data, data_arguments
from jobs.bench import feed
from jobs.data.multimodal import MultimodalData
from jobs.models.gpt import IGNORED


def test_both_sides_have_the_same_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "FILES", 2)
    monkeypatch.setattr(feed, "ROWS_PER_FILE", 24)
    recipe = feed.recipe(tmp_path, feed.write_set(tmp_path))
    data = build_data(recipe.data.build, data_arguments(recipe))
    assert isinstance(data, MultimodalData) and data.samples == 48
    inputs, targets_BT = data.micro_batch(1, 0)
    assert (inputs["segment"] >= 0).all() and (targets_BT != IGNORED).all(), "rows are full: no padding"
    table = pq.read_table(tmp_path / "train-00000-of-00002.parquet").slice(0, feed.BATCH)
    batch = {name: table[name].to_numpy(zero_copy_only=False) for name in ("image", "tokens")}
    theirs = feed.prepared(batch)
    targets = theirs.pop("targets")[0]
    assert theirs.keys() == inputs.keys()
    for name, values in theirs.items():
        assert values[0].shape == tuple(inputs[name].shape) and str(values.dtype) in str(inputs[name].dtype)
        if name in ("segment", "position", "has_image"):
            assert (values[0] == inputs[name].numpy()).all()
    assert targets.shape == tuple(targets_BT.shape)
    assert (theirs["tokens"][0, :, 1:11] == targets[:, :10]).all(), "each token's target is the one after it"
