"""All shardings by name. A further one is a file beside this one, and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, cast

from runtime.plan import Keeping
from strategies.options import WHOLE, Keeps

if TYPE_CHECKING:  # the controller plans by this table, and has no PyTorch
    from strategies.zero import ZeroRounds


class Entry(NamedTuple):
    """``messages``: where its rounds of messages are, "module:class". ``keeping``: what it keeps of a block
    from step to step, ``keeps``: what a worker's stage has in memory. ``salvages``: sums stay with who
    computed them, so that an interrupted step can go on; without, it is done again. ``ordered``: it can add
    in a fixed order, on which the bits of ``reduction = "fast"`` depend."""

    messages: str
    keeping: Keeping = Keeping.PARAMETERS
    keeps: Keeps = WHOLE
    salvages: bool = True
    ordered: bool = True

    def rounds(self) -> type[ZeroRounds]:
        """For those who compute."""
        module, _, name = self.messages.partition(":")
        return cast("type[ZeroRounds]", getattr(import_module(module), name))


SHARDINGS: Mapping[str, Entry] = {
    "ddp": Entry("strategies.shardings.ddp:ReplicaRounds", Keeping.STATE),
    "zero1": Entry("strategies.zero:ZeroRounds"),
    "zero2": Entry(
        "strategies.shardings.zero2:GradientRounds", keeps=Keeps(sums=False), salvages=False, ordered=False
    ),
    "zero3": Entry(
        "strategies.shardings.zero3:ParameterRounds",
        Keeping.NOTHING,
        Keeps(parameters=False, sums=False, streams=True),
        salvages=False,
        ordered=False,
    ),
}
DEFAULT = "zero1"
