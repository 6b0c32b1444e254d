"""All shardings by name. A further one is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from runtime.plan import Keeping
from strategies.keeps import WHOLE, Keeps
from strategies.shardings.ddp import ReplicaRounds
from strategies.shardings.zero2 import GradientRounds
from strategies.shardings.zero3 import ParameterRounds
from strategies.zero import ZeroRounds


class Entry(NamedTuple):
    """``rounds``: its messages. ``keeping``: what it keeps of a block from step to step, ``keeps``: what a
    worker's stage has in memory. ``salvages``: sums stay with who computed them, so that an interrupted step
    can go on; without, it is done again. ``ordered``: it can add in a fixed order, on which the bits of
    ``reduction = "fast"`` depend."""

    rounds: type[ZeroRounds]
    keeping: Keeping = Keeping.PARAMETERS
    keeps: Keeps = WHOLE
    salvages: bool = True
    ordered: bool = True


SHARDINGS: Mapping[str, Entry] = {
    "ddp": Entry(ReplicaRounds, Keeping.STATE),
    "zero1": Entry(ZeroRounds),
    "zero2": Entry(GradientRounds, keeps=Keeps(sums=False), salvages=False, ordered=False),
    "zero3": Entry(
        ParameterRounds,
        Keeping.NOTHING,
        Keeps(parameters=False, sums=False, streams=True),
        salvages=False,
        ordered=False,
    ),
}
DEFAULT = "zero1"
