"""The audit of a run's ledger: within every epoch no sample lost and none repeated, whatever happened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from runtime.samples import StepSamples

MOST_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class Audit:
    """``used`` counts samples over all epochs, ``epochs`` the whole ones, ``begun`` the samples of the one
    that was under way at the end. ``problems`` are sentences, the first few."""

    steps: int
    used: int
    epochs: int
    begun: int
    problems: tuple[str, ...]


def audit(
    ledger: Mapping[int, StepSamples], *, steps: int, micro_batches: int, samples: int, epoch_samples: int
) -> Audit:
    """Goes through what ``steps`` committed steps of ``micro_batches`` each used of a set of ``samples``, of
    which a whole epoch uses ``epoch_samples``."""
    problems: list[str] = []
    seen: dict[int, dict[int, int]] = {}  # epoch -> sample -> step
    for step, micro_batch, epoch, sample in _uses(ledger, steps, micro_batches, problems):
        if not 0 <= sample < samples:
            problems.append(f"step {step} used sample {sample}, but the set has {samples}")
            continue
        of_epoch = seen.setdefault(epoch, {})
        if sample in of_epoch:
            problems.append(
                f"epoch {epoch}: sample {sample} was used in step {of_epoch[sample]} and again in step "
                f"{step} (micro-batch {micro_batch})"
            )
        else:
            of_epoch[sample] = step
    last = max(seen, default=-1)
    for epoch in range(last):
        used = len(seen.get(epoch, {}))
        if used != epoch_samples:
            problems.append(f"epoch {epoch}: {used} of {epoch_samples} samples were used before it ended")
    begun = len(seen.get(last, {}))
    if begun > epoch_samples:
        problems.append(f"epoch {last}: {begun} samples were used, more than its {epoch_samples}")
    return Audit(
        steps=len(ledger),
        used=sum(map(len, seen.values())),
        epochs=max(0, last) + (begun == epoch_samples),
        begun=0 if begun == epoch_samples else begun,
        problems=tuple(problems[:MOST_PROBLEMS]),
    )


def _uses(
    ledger: Mapping[int, StepSamples], steps: int, micro_batches: int, problems: list[str]
) -> Iterator[tuple[int, int, int, int]]:
    """(step, micro-batch, epoch, sample) of all that was used; what is missing or misplaced is a problem."""
    newest = 0
    for step in sorted(set(ledger) | set(range(1, steps + 1))):
        if step not in ledger:
            problems.append(f"step {step} is not in the ledger")
            continue
        if step > steps:
            problems.append(f"step {step} is in the ledger, but only {steps} steps were committed")
        numbers = [micro_batch for micro_batch, _ in ledger[step]]
        if numbers != list(range(micro_batches)):
            problems.append(
                f"step {step} used the micro-batches {numbers} instead of 0 to {micro_batches - 1}"
            )
        for micro_batch, samples in ledger[step]:
            for epoch, ids in samples:
                if epoch < newest:
                    problems.append(
                        f"step {step} used samples of epoch {epoch} after epoch {newest} had begun"
                    )
                newest = max(newest, epoch)
                yield from ((step, micro_batch, epoch, sample) for sample in ids)
