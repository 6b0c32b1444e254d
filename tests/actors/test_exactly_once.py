"""Whatever happens to a run, its ledger says that every sample was used once in every epoch."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs.audit import Audit, audit
from jobs.data.curated import open_set
from jobs.data.multimodal import MultimodalData, build
from jobs.models import captioner
from runtime.run_folder import RunFolder
from runtime.samples import Read
from strategies.job import Job
from tests.support.captions import COUNTS, SIZE, write_set
from tests.support.chaos import ChaosRun, newest_checkpoint, random_faults, resume
from tests.support.cluster import toy_job
from tests.support.expected import Bits, reference_bits

STEPS = 6
SAMPLES = sum(COUNTS["train"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("curated"))


def read(folder: Path) -> MultimodalData:
    return build(
        source=str(folder),
        context=20,
        slots=3,
        micro_batch_size=1,
        micro_batches=5,
        seed=7,
        crop=0.2,
        jitter=0.2,
    )


def model(folder: Path) -> Any:
    return captioner.build(
        image_size=SIZE,
        patch=8,
        width=8,
        depth_image=1,
        depth_text=1,
        heads=2,
        vocabulary=open_set(folder).tokenizer.vocabulary,
        context=20,
    )


def captions_job(run: Path, folder: Path, **changes: Any) -> Job:
    values = {"build_model": partial(model, folder), "build_data": partial(read, folder), "steps": STEPS}
    return toy_job(run, **{**values, **changes})


@pytest.fixture(scope="module")
def bits(folder: Path) -> Bits:
    return reference_bits(STEPS, build_model=partial(model, folder), data=read(folder))


def audited(run: Path, steps: int = STEPS) -> Audit:
    """From the run folder alone."""
    return audit(
        RunFolder(run).read_samples(),
        steps=steps,
        micro_batches=5,
        samples=SAMPLES,
        epoch_samples=SAMPLES,
    )


def assert_exactly_once(run: Path) -> None:
    found = audited(run)
    assert found.problems == ()
    assert found.steps == STEPS and found.epochs >= 2, "the run is long enough to tell"


def test_undisturbed(folder: Path, tmp_path: Path, bits: Bits) -> None:
    result = ChaosRun(captions_job(tmp_path, folder), tmp_path, 3, 2).run()
    assert result.bits == bits
    assert_exactly_once(tmp_path)
    ledger = RunFolder(tmp_path).read_samples()
    for record in result.steps:
        used = sum(len(ids) for _, samples in ledger[record.step] for _, ids in samples)
        assert record.samples == used and record.read == ()


@pytest.mark.parametrize("seed", range(20))
def test_random_faults(folder: Path, tmp_path: Path, bits: Bits, seed: int) -> None:
    rng = random.Random(7000 + seed)
    workers = rng.choice([2, 3, 4, 5])
    victims = rng.sample(range(workers), rng.randint(1, workers - 1))
    job = captions_job(
        tmp_path,
        folder,
        faults=random_faults(rng, workers, victims, STEPS),
        checkpoint_every=rng.choice([0, 3]),
        salvage=rng.random() < 0.8,
    )
    stages = min(workers, rng.choice([1, 2, 3]))
    growing = rng.random() < 0.3
    result = ChaosRun(job, tmp_path, workers, stages, max_workers=workers if growing else None).run()
    assert result.outcome == "completed", result.message
    assert result.bits == bits
    assert_exactly_once(tmp_path)


@pytest.mark.parametrize(("before", "after"), [((4, 2), (1, 1)), ((1, 1), (5, 3)), ((3, 2), (2, 2))])
def test_resumed_by_others(folder: Path, tmp_path: Path, bits: Bits, before: Any, after: Any) -> None:
    """The first start goes on behind its newest checkpoint: what it did there does not count."""
    job = captions_job(tmp_path, folder, checkpoint_every=3, faults=())
    first = ChaosRun(captions_job(tmp_path, folder, steps=5, checkpoint_every=3), tmp_path, *before, keep=9)
    assert first.run().outcome == "completed"
    durable, _ = newest_checkpoint(job)
    assert durable is not None and durable.version == 5
    (Path(job.checkpoint_root) / "step-00000005" / "manifest.json").unlink()
    RunFolder(tmp_path).supersede_steps(4)  # as the controller does that resumes from step 3
    second = resume(job, tmp_path, *after)
    assert second.outcome == "completed" and second.bits == bits[3:]
    assert_exactly_once(tmp_path)


class Stale(MultimodalData):
    """Says what it reads, but once reads what was read before."""

    def inputs(self, step: int, micro_batch: int) -> Read:
        return super().inputs(*stale(step, micro_batch))

    def targets(self, step: int, micro_batch: int) -> Read:
        return super().targets(*stale(step, micro_batch))


def stale(step: int, micro_batch: int) -> tuple[int, int]:
    return (step - 1, micro_batch) if (step, micro_batch) == (4, 2) else (step, micro_batch)


def broken_data(folder: Path, kind: type[MultimodalData]) -> MultimodalData:
    data = read(folder)
    data.__class__ = kind
    return data


def test_the_ledger_tells_what_was_read_not_what_should_have_been(folder: Path, tmp_path: Path) -> None:
    job = captions_job(tmp_path, folder, build_data=partial(broken_data, folder, Stale))
    result = ChaosRun(job, tmp_path, 3, 2).run()
    assert result.outcome == "completed"
    assert any("again in step 4 (micro-batch 2)" in problem for problem in audited(tmp_path).problems)


class Torn(MultimodalData):
    """Its targets are not those of its inputs."""

    def targets(self, step: int, micro_batch: int) -> Read:
        return super().targets(step + (step == 3), micro_batch)


@pytest.mark.parametrize(("workers", "stages"), [(1, 1), (3, 2)])
def test_inputs_and_targets_must_be_of_the_same_samples(
    folder: Path, tmp_path: Path, workers: int, stages: int
) -> None:
    job = captions_job(tmp_path, folder, build_data=partial(broken_data, folder, Torn))
    result = ChaosRun(job, tmp_path, workers, stages).run()
    assert result.outcome == "failed" and "of other samples than its targets" in result.message
