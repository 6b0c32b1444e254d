"""A data set that says what was read of it, and feed workers that answer when a test has them do so."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from actors.prefetch import Prepared, prepare
from runtime.samples import Read
from strategies.reading import Wanted
from tests.support.models import Tokens


class Told(Tokens):
    """Tokens that say which samples they are: the step and the micro-batch."""

    digest = "told"

    def inputs(self, step: int, micro_batch: int) -> Read:
        return Read({"x": self.micro_batch(step, micro_batch)[0]}, ((step, (micro_batch,)),))

    def targets(self, step: int, micro_batch: int) -> Read:
        return Read(self.micro_batch(step, micro_batch)[1], ((step, (micro_batch,)),))


class Asked:
    """Futures that a test resolves by hand."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.futures: dict[Wanted, Future[list[Prepared]]] = {}
        self.calls: list[list[Wanted]] = []
        self.answers = True

    @property
    def order(self) -> list[Wanted]:
        return [wanted for call in self.calls for wanted in call]

    def __call__(self, wanted: Sequence[Wanted]) -> Future[list[Prepared]] | None:
        if not self.answers:
            return None
        self.calls.append(list(wanted))
        future: Future[list[Prepared]] = Future()
        self.futures |= dict.fromkeys(wanted, future)
        return future

    def answer(self, wanted: Wanted) -> None:
        (call,) = (call for call in self.calls if wanted in call)
        self.futures[wanted].set_result(prepare(self.data, call))


def tensor(found: Read) -> Tensor:
    value = found.value
    return value["x"] if isinstance(value, dict) else value
