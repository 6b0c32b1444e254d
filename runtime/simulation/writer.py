"""A simulated worker's one thread that writes its part of checkpoints behind the training's back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.protocol import Unwritten, Written
from runtime.simulation.clock import Action
from runtime.simulation.move import piece_of
from runtime.simulation.step import SimStep

if TYPE_CHECKING:
    from runtime.simulation.worker import SimWorker

LEAST_SECONDS, MOST_SECONDS = 0.01, 0.3
"""How long a write takes."""


class Writer:
    """Does one thing after the other."""

    def __init__(self, worker: SimWorker) -> None:
        self._worker = worker
        self._under_way = 0
        self._free_at = 0.0

    def later(self, seconds: float, action: Action) -> None:
        """``action`` after ``seconds`` of work, which begins when all that was asked for before is done."""
        process = self._worker.process
        self._free_at = max(self._free_at, process.clock.now) + seconds
        process.after(self._free_at - process.clock.now, action)

    def write(self, step: SimStep, version: int, *, is_last: bool) -> None:
        """The owned shards, as they are now; a checkpoint is left out where the one before is not done."""
        worker, generation = self._worker, step.plan.generation
        if self._under_way and not is_last:
            worker.tell(Unwritten(worker.worker, version, "was still writing"))
            return
        pieces = {piece_of(shard): worker.store.get(piece_of(shard), version) for shard in step.owned}
        whole = {piece: values for piece, values in pieces.items() if values is not None}
        assert len(whole) == len(pieces), "an owned shard is not held"
        exponents = worker.exponents[version]
        self._under_way += 1

        def write() -> None:
            worker.watch.reached(worker.worker, "checkpoint")
            if not worker.process.alive:
                return
            file = worker.storage.write(version, worker.worker, generation, whole)
            worker.forget_untold()
            worker.tell_surely(Written(worker.worker, generation, version, exponents, file))
            self._under_way -= 1

        self.later(worker.process.random.uniform(LEAST_SECONDS, MOST_SECONDS), write)
