"""All shardings by name. A further one is a file beside this one, and a line here and in ``rounds``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from runtime.plan import Keeping
from strategies.options import WHOLE, Keeps


class Entry(NamedTuple):
    """``keeping``: what it keeps of a block from step to step, ``keeps``: what a
    worker's stage has in memory. ``salvages``: sums stay with who computed them, so that an interrupted step
    can go on; without, it is done again. ``ordered``: it can add in a fixed order, on which the bits of
    ``reduction = "fast"`` depend."""

    keeping: Keeping = Keeping.PARAMETERS
    keeps: Keeps = WHOLE
    salvages: bool = True
    ordered: bool = True


SHARDINGS: Mapping[str, Entry] = {
    "ddp": Entry(Keeping.STATE),
    "zero1": Entry(),
    "zero2": Entry(keeps=Keeps(sums=False), salvages=False, ordered=False),
    "zero3": Entry(
        Keeping.NOTHING,
        Keeps(parameters=False, sums=False, streams=True),
        salvages=False,
        ordered=False,
    ),
}
DEFAULT = "zero1"
