"""Keeps the run folder's timeline up to date, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from runtime.events import (
    ControllerRestarted,
    Event,
    Paused,
    Rebalanced,
    Recovered,
    Resumed,
    StepRepeated,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
)
from runtime.protocol import Timed
from runtime.run_folder import RunFolder, read_json_lines
from runtime.timeline import Timeline

EVERY_SECONDS = 1.0
"""How often the timeline is written at most."""

SHARE = 0.01
"""The share of one processor that writing may take: the larger the timeline, the rarer."""


class TimelineWriter:
    """Writes the timeline while something changes. What cannot be written is left out: training goes on.

    ``take`` and ``note`` may be called from any thread; neither waits for a file.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._timeline = Timeline()
        self.take: Callable[[Timed], None] = self._timeline.take
        self._folder = folder
        self._written = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="timeline", daemon=True)
        with suppress(ValueError, KeyError, OSError):  # an earlier one that is broken costs only itself
            self._timeline.restore(read_json_lines(folder.timeline_file)[0])

    def note(self, event: Event) -> None:
        """Sees that the steps around what people will want to look at are kept."""
        match event:
            case (
                WorkerLost()
                | Recovered()
                | WorkerJoined()
                | WorkerLeft()
                | Rebalanced()
                | Paused()
                | Resumed()
                | ControllerRestarted()
                | StepRepeated()
            ):
                self._timeline.mark(event.step)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Writes what is new and ends. Idempotent."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _live(self) -> None:
        pause = EVERY_SECONDS
        while not self._ended.wait(pause):
            pause = max(EVERY_SECONDS, self._write() / SHARE)
        self._write()

    def _write(self) -> float:
        """Processor seconds that it took."""
        changes = self._timeline.changes
        if changes == self._written:
            return 0.0
        began = time.thread_time()
        with suppress(OSError):
            self._folder.write_timeline(self._timeline.text())
        self._written = changes
        return time.thread_time() - began
