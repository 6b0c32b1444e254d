"""Workers wait longer for a controller that has been started and is not there yet.

One that takes over reads the run's record first, which takes the longer the more steps there are (some ten
seconds for each 200,000), and nobody must leave meanwhile as if there were no controller any more.
"""

from __future__ import annotations

import threading
from contextlib import suppress

import ray
from ray.exceptions import RayError

from actors.names import NAMESPACE
from runtime.plan import WorkerId

ASKED = 4
"""So many times are workers asked in the time after which they would leave."""


class Reassurance:
    """Asks the workers of these ``names`` to wait, again and again until ``end``, in a thread of its own.
    ``orphan_seconds``: after how long they leave otherwise."""

    def __init__(self, names: dict[WorkerId, str], orphan_seconds: float) -> None:
        self._names, self._orphan_seconds = names, orphan_seconds
        self._ended = threading.Event()
        threading.Thread(target=self._ask, name="reassurance", daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def _ask(self) -> None:
        handles = []
        for name in self._names.values():
            with suppress(ValueError):  # it died just now
                handles.append(ray.get_actor(name, namespace=NAMESPACE))
        while True:
            for handle in handles:
                with suppress(RayError):  # who is dead waits for nobody
                    handle.wait_on.remote()
            if self._ended.wait(self._orphan_seconds / ASKED):
                return
