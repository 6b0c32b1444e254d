"""Curated sets, curation's files and checkpoints on S3 over HTTP: pyarrow's own client, moto's server."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs

from jobs.curation.work import Work
from jobs.data.curated import open_set
from jobs.data.multimodal import build
from jobs.serving.source import RunSource
from runtime.checkpoint import MANIFEST, folder_name, list_checkpoints, load_manifest
from runtime.run_folder import RunFolder
from runtime.storage import Store
from tests.support.captions import write_set
from tests.support.chaos import ChaosRun, newest_checkpoint, resume
from tests.support.cluster import toy_job
from tests.support.expected import toy_bits
from tests.support.served import make_run, write_checkpoint

BUCKET = "bucket"


@pytest.fixture(scope="module")
def query() -> Iterator[str]:
    """The parameters of a URI of the server's; credentials are in the environment, as they always are."""
    from moto.server import ThreadedMotoServer  # only here: whoever lacks it fails here alone

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "not-a-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server.start()
        try:
            endpoint = "{}:{}".format(*server.get_host_and_port())
            place: dict[str, Any] = {"endpoint_override": endpoint, "scheme": "http", "region": "us-east-1"}
            fs.S3FileSystem(**place, allow_bucket_creation=True).create_dir(BUCKET)
            yield "?" + "&".join(f"{key}={value}" for key, value in place.items())
        finally:
            server.stop()


def upload(folder: Path, uri: str) -> None:
    store = Store.open(uri)
    fs.copy_files(
        str(folder),
        store.path,
        source_filesystem=fs.LocalFileSystem(),
        destination_filesystem=store.filesystem,
    )


def test_a_curated_set_is_read_as_from_a_disk(tmp_path: Path, query: str) -> None:
    write_set(tmp_path / "set")
    uri = f"s3://{BUCKET}/set{query}"
    upload(tmp_path / "set", uri)
    asked: dict[str, Any] = {"context": 60, "slots": 3, "micro_batch_size": 3, "micro_batches": 2, "seed": 1}
    here, there = (
        build(source=source, memory_mb=0, audio=True, **asked) for source in (str(tmp_path / "set"), uri)
    )
    assert here.digest == there.digest
    for step, micro_batch in ((1, 0), (1, 1), (9, 0)):
        mine, theirs = (data.inputs(step, micro_batch) for data in (here, there))
        assert mine.samples == theirs.samples
        assert all(torch.equal(mine.value[name], theirs.value[name]) for name in mine.value)
    open_set(uri).check()
    with pytest.raises(ValueError, match="there is no manifest"):
        open_set(f"s3://no-such-bucket/set{query}")


def test_what_curation_keeps_appears_whole_or_not_at_all(query: str) -> None:
    work = Work(Store.open(f"s3://{BUCKET}/curated{query}"), "k1")
    work.publish("dropped.csv", b"one,two\n")
    assert work.store.size("dropped.csv") == 8
    with (
        pytest.raises(RuntimeError, match="no room"),
        work.store.publish(work.folder, "half.parquet") as stream,
    ):
        stream.write(b"the first half")
        raise RuntimeError("no room for the second")
    assert work.store.size(work.folder, "half.parquet") is None
    assert work.finished_units() == set()


def test_a_run_goes_on_from_the_newest_whole_checkpoint(tmp_path: Path, query: str) -> None:
    """Written by three workers; the newest one is torn; two stages go on from the one before."""
    root = f"s3://{BUCKET}/run/checkpoints{query}"
    job = toy_job(tmp_path, steps=4, checkpoint_every=2, checkpoint_root=root)
    first = ChaosRun(job, tmp_path, 3, 1).run()
    assert first.outcome == "completed" and list_checkpoints(root) == [2, 4]
    store = Store.open(root)
    torn = store.at(folder_name(4), load_manifest(root, 4).files[1].name)
    with store.filesystem.open_input_stream(torn) as stream:
        content: bytes = stream.read()
    with store.filesystem.open_output_stream(torn) as stream:
        stream.write(content[:-5])
    durable, problems = newest_checkpoint(job)
    assert durable is not None and durable.version == 2
    assert len(problems) == 1 and torn in problems[0]
    store.filesystem.delete_file(store.at(folder_name(4), MANIFEST))
    RunFolder(tmp_path).supersede_steps(3)
    second = resume(toy_job(tmp_path, steps=6, checkpoint_root=root), tmp_path, 2, 2)
    assert second.outcome == "completed", second.message
    assert second.bits == toy_bits(6)[2:]
    assert list_checkpoints(root) == [2, 6]


def test_a_bucket_that_is_not_there_costs_the_checkpoint_and_not_the_run(tmp_path: Path, query: str) -> None:
    root = f"s3://no-such-bucket/run{query}"
    result = ChaosRun(toy_job(tmp_path, steps=2, checkpoint_root=root), tmp_path, 2, 1).run()
    assert result.bits == toy_bits(2)
    assert result.outcome == "completed" and "last checkpoint could not be written" in result.message


def test_a_service_takes_its_checkpoints_from_there(tmp_path: Path, query: str) -> None:
    recipe = make_run(tmp_path / "here")
    layers = write_checkpoint(tmp_path / "here", recipe, 10, 10)
    uri = f"s3://{BUCKET}/served{query}"
    upload(RunFolder(tmp_path / "here").checkpoints, uri)
    elsewhere = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"folder": uri})})
    RunFolder.create(tmp_path / "there", elsewhere.to_toml(), {"seed": 1})
    version, decoder = RunSource(tmp_path / "there").first()
    assert version == 10
    embedded = decoder.embed(torch.arange(decoder.vocabulary))
    assert torch.equal(embedded, layers[0].get_parameter("weight"))
