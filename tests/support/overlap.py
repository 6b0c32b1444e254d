"""How long a team takes for its layers, by simulation: what is on its way while it computes is free.

Simulated is one member, all of whose peers are like it and in step with it; the acts and their order are
those that ``SequenceStage`` goes by (``Phases.forward`` and ``backward``). Its link carries one exchange
after the other, and sending keeps it from no computation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from strategies.sequence.phases import Act, Phase, Phases


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds of one micro-batch, forward and backward; ``transfers`` are those of all exchanges together."""

    seconds: float
    computing: float
    transfers: float

    @property
    def exposed(self) -> float:
        """Of the exchanges' seconds those that nothing hides."""
        return self.seconds - self.computing


def simulate_team(
    layers: Sequence[Phases],
    compute: Callable[[Phase], float],
    transfer: Callable[[str], float],
    backward: float = 2.0,
) -> Taken:
    """``compute``: seconds of one member for a phase, forward; backward takes ``backward`` times as long.
    ``transfer``: seconds that an exchange of a value (or its gradient) is on its way."""
    clock = _Clock()
    for index, phases in enumerate(layers):
        for act, number, name in phases.forward:
            clock.do(act, (index, name), compute(phases.steps[number]), transfer(name) if name else 0.0)
    for index, phases in reversed(list(enumerate(layers))):
        for act, number, name in phases.backward:
            seconds = backward * compute(phases.steps[number])
            clock.do(act, (index, name), seconds, transfer(name) if name else 0.0)
    return Taken(clock.now, clock.computing, clock.transfers)


class _Clock:
    def __init__(self) -> None:
        self.now = self.computing = self.transfers = self._link_free = 0.0
        self._lands: dict[tuple[int, str], float] = {}

    def do(self, act: Act, what: tuple[int, str], compute: float, transfer: float) -> None:
        if act is Act.COMPUTE:
            self.now += compute
            self.computing += compute
        elif act is Act.SEND:
            self._link_free = max(self.now, self._link_free) + transfer
            self._lands[what] = self._link_free
            self.transfers += transfer
        else:
            self.now = max(self.now, self._lands.pop(what))
