"""All shardings by name. A further one is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Entry(NamedTuple):
    """``whole``: its workers keep the parameters of their layers from step to step, so that these can be
    offloaded (``shardings.offload``). ``salvages``: sums stay with who computed them, so that an interrupted
    step can go on; without, it is done again. ``ordered``: it can add in a fixed order, which
    ``reduction = "fast"`` depends on."""

    whole: bool = True
    salvages: bool = True
    ordered: bool = True


SHARDINGS: Mapping[str, Entry] = {
    "ddp": Entry(),
    "zero1": Entry(),
    "zero2": Entry(salvages=False, ordered=False),
    "zero3": Entry(whole=False, salvages=False, ordered=False),
}
DEFAULT = "zero1"
