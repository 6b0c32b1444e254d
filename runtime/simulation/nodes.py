"""Machines that are lost and come back, and the workers that find a place on them."""

from __future__ import annotations

from collections import deque

from runtime.plan import WorkerId


class Nodes:
    """``count`` machines with room for ``workers_per_node`` each; a worker that was asked for waits here."""

    def __init__(self, count: int, workers_per_node: int) -> None:
        self.count = count
        self.living: set[WorkerId] = set()
        self._workers_per_node = workers_per_node
        self._node_of: dict[WorkerId, int] = {}
        self._gone: set[int] = set()
        self._free: deque[int] = deque()
        self._wanted: deque[WorkerId] = deque()

    def is_gone(self, node: int) -> bool:
        return node in self._gone

    def on(self, node: int) -> list[WorkerId]:
        """The living workers on ``node``, ascending."""
        return sorted(worker for worker in self.living if self._node_of[worker] == node)

    def node_of(self, worker: WorkerId) -> int:
        return self._node_of[worker]

    def start(self, worker: WorkerId, node: int) -> None:
        self._node_of[worker] = node
        self.living.add(worker)

    def lose(self, node: int) -> list[WorkerId]:
        """The workers that die with ``node``."""
        lost = self.on(node)
        self._gone.add(node)
        self._free = deque(place for place in self._free if place != node)
        self.living.difference_update(lost)
        return lost

    def come_back(self, node: int) -> None:
        self._gone.discard(node)
        self._free.extend([node] * (self._workers_per_node - len(self.on(node))))

    def vacate(self, node: int) -> None:
        """One worker less on ``node``: there is room for another, unless the machine itself is gone."""
        if node not in self._gone:
            self._free.append(node)

    def ask(self, worker: WorkerId) -> None:
        self._wanted.append(worker)

    def placed(self) -> list[tuple[WorkerId, int]]:
        """(worker, node) of everybody who was asked for and has found a place now."""
        found = []
        while self._wanted and self._free:
            found.append((self._wanted.popleft(), self._free.popleft()))
        return found
