"""Lines that a recipe's own function makes of each checkpoint, while the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

from jobs.builders import load_builder
from jobs.recipe.recipe import Recipe
from runtime.events import CheckpointWritten, Event


class Showing:
    """Calls ``data.show`` with the run's folder and a checkpoint's version, in a thread of its own: nothing
    waits for it but ``look`` with ``last``. While it is busy the newest checkpoint waits, older ones are left
    out."""

    def __init__(self, recipe: Recipe, run: Path) -> None:
        self._show = None if recipe.data.show is None else load_builder(recipe.data.show)
        self._run = run
        self._shown: Future[list[str]] | None = None
        self._waiting: int | None = None

    def look(self, events: Iterable[Event], *, last: bool = False) -> list[str]:
        """The lines that have been made since the last look; with ``last`` all of them."""
        for event in events:
            if isinstance(event, CheckpointWritten):
                self._waiting = event.version
        lines: list[str] = []
        while self._show is not None:
            if self._shown is not None and (last or self._shown.done()):
                lines += self._take(self._shown)
                self._shown = None
            if self._shown is not None or self._waiting is None:
                break
            self._shown = self._begin(self._show, self._waiting)
            self._waiting = None
        return lines

    def _begin(self, show: Callable[[Path, int], list[str]], version: int) -> Future[list[str]]:
        shown: Future[list[str]] = Future()

        def work() -> None:
            try:
                shown.set_result(show(self._run, version))
            except BaseException as error:  # whoever takes the lines gets it
                shown.set_exception(error)

        # a daemon, which no pool's thread is: who stops at once, waits for no caption
        Thread(target=work, name="show", daemon=True).start()
        return shown

    def _take(self, shown: Future[list[str]]) -> list[str]:
        try:
            return shown.result()
        except Exception as error:  # what a person's own function raises must not end the show of the run
            return [f"data.show failed: {error}"]
