"""Memory for the layers that a worker is about to take over, made ready while it still trains."""

from __future__ import annotations

from threading import Event, Thread

from torch import Tensor

from runtime.plan import Plan, WorkerId
from runtime.salvage import layers_of
from strategies.stage import StageModel

_ELEMENTS = 1 << 18
"""Written to at a time, between two looks at whether the worker has come to the boundary."""


class Room:
    """Parameters and sums of the blocks that are new to ``worker`` with ``plan``, in host memory.

    Memory that is written to for the first time comes slowly (on a virtual machine at 1 to 3 ms for a
    megabyte), and at the boundary others would stand still for it. A thread of its own writes zeros to it
    beforehand; what it has not reached by then comes slowly. Called by one thread at a time.
    """

    def __init__(self, stage: StageModel, plan: Plan, worker: WorkerId) -> None:
        self.generation = plan.generation
        blocks = {
            block.index: block.size
            for layers in layers_of(plan, worker).values()
            for block in stage.layout.blocks_of(*layers)
        }
        self._working = _beside(stage.working, blocks)
        self._accumulators = _beside(stage.accumulators, blocks)
        self._ended = Event()
        self._thread = Thread(target=self._fill, name=f"room-{worker}", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        for memory in (*self._working.values(), *self._accumulators.values()):
            for start in range(0, memory.numel(), _ELEMENTS):
                if self._ended.is_set():
                    return
                memory[start : start + _ELEMENTS].zero_()

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()
        self._thread.join()

    def give(self, stage: StageModel) -> None:
        """Ends the thread and hands the memory to ``stage``, which is to hold the blocks next."""
        self.close()
        stage.prepare(self._working, self._accumulators)


def _beside(held: dict[int, Tensor], blocks: dict[int, int]) -> dict[int, Tensor]:
    """What is missing there of ``blocks`` (index to size), like what is there; nothing if that is elsewhere
    than in host memory, or empty."""
    like = next(iter(held.values()), None)
    if like is None or not like.is_cpu or like.is_pinned():
        return {}
    return {block: like.new_empty(size) for block, size in blocks.items() if block not in held}
