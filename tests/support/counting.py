"""A run in one process whose messages are counted: bytes by worker, step and channel, and what workers tell
of their memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from runtime.fabric.interface import Tag
from runtime.protocol import Measured
from tests.support.chaos import ChaosRun

CHANNELS = {
    "reduce": ("reduce", "contribution"),
    "gather": ("gather", "spread"),
    "fetch": ("parameters", "parameters wanted"),
    "backup": ("backup",),
}
"""Which messages the fields of ``strategies.shardings.theory.Sent`` speak of."""


@dataclass
class CountingRun(ChaosRun):
    sent: Counter[tuple[int, int, str]] = field(default_factory=Counter)
    told: dict[tuple[int, int], Measured] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._counting = threading.Lock()
        super().__post_init__()

    def _endpoint(self, worker: int, on_control: Any, on_lost: Any) -> Any:
        endpoint = super()._endpoint(worker, on_control, on_lost)
        send = endpoint.send

        def counted(to: int, tag: Tag, tensors: Sequence[Tensor] = (), note: Any = None, **how: bool) -> None:
            with self._counting:
                self.sent[worker, tag.step, tag.what] += sum(t.nbytes for t in tensors)
                if isinstance(note, Measured):
                    self.told[worker, note.step] = note
            send(to, tag, tensors, note, **how)

        endpoint.send = counted
        return endpoint

    def bytes_of(self, worker: int, step: int) -> dict[str, int]:
        """What ``worker`` sent in ``step``, by the fields of ``Sent``."""
        return {
            name: sum(self.sent[worker, step, what] for what in channels)
            for name, channels in CHANNELS.items()
        }
