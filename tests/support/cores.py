"""Which test process has which core to itself."""

from __future__ import annotations

import socket
from collections.abc import Sequence


class Claim:
    """On one of ``cores``, for as long as the process lives or until it is given back.

    There may be more test processes than cores, of which some wait for a cluster at times: who has no core
    takes the first that is given back. A name in Linux's abstract namespace is had by one process only, and
    is free again however that one ends.
    """

    def __init__(self, cores: Sequence[int], prefix: str = "reknit-tests-core") -> None:
        self.core: int | None = None
        self._cores, self._prefix = cores, prefix
        self._name: socket.socket | None = None

    def take(self) -> int | None:
        """The core that this process has, or gets now; none if all are others'."""
        for core in self._cores if self.core is None else ():
            name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                name.bind(f"\0{self._prefix}-{core}")
            except OSError:
                name.close()
            else:
                self.core, self._name = core, name
                break
        return self.core

    def give_back(self) -> None:
        """Leaves the core to others; nothing happens where none was taken."""
        if self._name is not None:
            self._name.close()
        self.core = self._name = None
