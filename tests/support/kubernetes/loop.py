"""A thread that calls a function again and again until it is told to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

import httpx


class Loop:
    """``step`` may be refused by the server, as when an object has changed or gone meanwhile: the next call
    sees what is. Any other error ends the loop and is raised by ``__exit__``."""

    def __init__(self, name: str, step: Callable[[], None], seconds: float = 0.2) -> None:
        self._step, self._seconds = step, seconds
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self.refusals: list[str] = []
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Loop:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._step()
            except httpx.HTTPError as refused:
                self.refusals.append(str(refused))
            except BaseException as error:
                self._error = error
                return
            self._stopped.wait(self._seconds)
