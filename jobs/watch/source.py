"""Where the record of a run is read: its folder on this machine, or its controller on the cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ray.exceptions import RayError

from actors.cluster import RayRun
from jobs.control import found
from runtime.run_folder import RunFolder


class Source(Protocol):
    """``name`` is the run's. ``piece``: as ``RunFolder.piece``; raises OSError where it cannot be reached."""

    @property
    def name(self) -> str: ...

    def piece(self, name: str, offset: int) -> bytes | None: ...


class ControllerSource:
    """The record as the controller of a run under way reads it, on whatever machine it is."""

    def __init__(self, run: RayRun) -> None:
        self.name = run.name
        self._run = run

    def piece(self, name: str, offset: int) -> bytes | None:
        try:
            return self._run.piece(name, offset)
        except RayError as error:
            raise ConnectionError(
                f"the controller of {self.name} does not answer: the run may have ended "
                f"({type(error).__name__})"
            ) from None


@contextmanager
def source_of(run: str | Path) -> Iterator[Source]:
    """The run recorded in a folder, else the one called so on the cluster that this process was started for.

    A folder is read as it is, whether the run goes on or has ended, so that a controller that dies and comes
    back goes unnoticed. Raises ValueError if there is no such run.
    """
    folder = RunFolder(run)
    if folder.exists():
        yield folder
        return
    with found(run) as way:
        yield ControllerSource(way)
