"""What of its layers a stage has in memory all the time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Keeps:
    """The held layers' ``parameters``, and ``sums`` of all of their gradients. With ``streams`` the layers
    compute with parameters that come and go (``residence``)."""

    parameters: bool = True
    sums: bool = True
    streams: bool = False

    @property
    def offloads(self) -> bool:
        """Whether what is kept is not where the layers compute, but in host memory."""
        return self.streams and self.parameters


WHOLE = Keeps()
