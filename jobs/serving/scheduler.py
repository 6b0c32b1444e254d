"""Who joins the next iteration: a pure decision.

Sequences are admitted and retired between any two iterations (Yu et al., "Orca", OSDI 2022, section 3.1),
in the order of their arrival. An iteration takes in only so many prompt positions that those who are
being answered do not wait long for their next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """``sequences`` at once; ``prompt_positions`` per iteration; ``cached_positions`` in all, counted as what
    every sequence may come to at its end.

    A sequence that is larger than a limit by itself is admitted when nothing else counts against it.
    """

    sequences: int = 16
    prompt_positions: int = 512
    cached_positions: int = 1 << 16

    def __post_init__(self) -> None:
        if min(self.sequences, self.prompt_positions, self.cached_positions) < 1:
            raise ValueError(f"every limit must be at least 1, not {self}")


@dataclass(frozen=True, slots=True)
class Demand:
    """A sequence's positions: of its prompt, and at its end at the most."""

    prompt: int
    most: int


def admitted(waiting: Sequence[Demand], running: Sequence[Demand], limits: Limits) -> int:
    """How many of ``waiting``, from the first on, join those that are ``running``.

    Never passes anybody over, so nobody starves.
    """
    count = len(running)
    cached = sum(demand.most for demand in running)
    prompt = 0
    taken = 0
    for demand in waiting:
        if count + 1 > limits.sequences:
            break
        if cached and cached + demand.most > limits.cached_positions:
            break
        if prompt and prompt + demand.prompt > limits.prompt_positions:
            break
        count, cached, prompt = count + 1, cached + demand.most, prompt + demand.prompt
        taken += 1
    return taken
