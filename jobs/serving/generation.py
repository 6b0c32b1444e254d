"""What is asked of an engine, as picklable values. Imports no torch: the ingress has no need of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Finish = Literal["stop", "length"]
"""An end token was chosen; ``max_tokens`` or the context were reached."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """``temperature`` 0 takes the likeliest token; ``top_p`` keeps the fewest likeliest tokens whose
    probabilities add up to it (nucleus sampling: Holtzman et al., "The Curious Case of Neural Text
    Degeneration", 2020, section 3.1). Raises ValueError for values that mean nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise ValueError(f"temperature is {self.temperature}: it must be from 0 to 100")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1")


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an answer is to follow: ``tokens``, at least one, and before them what a captioner sees.

    ``image`` is uint8 y, x, 3 of the model's image size as bytes, ``audio`` int16 samples at its rate.
    """

    tokens: tuple[int, ...]
    image: bytes | None = None
    audio: bytes | None = None

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("the prompt is empty: give at least one token")


@dataclass(frozen=True, slots=True)
class Generation:
    """What is asked for. ``end`` are the tokens that end an answer (they are not part of it); ``given``
    the first tokens of the answer that somebody has already, which are not told again; ``version`` asks for
    that of the model, if it is at hand.
    """

    prompt: Prompt
    max_tokens: int
    sampling: Sampling = GREEDY
    end: frozenset[int] = frozenset()
    given: tuple[int, ...] = ()
    version: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}: it must be at least 1")

    def continued(self, given: tuple[int, ...], version: int) -> Generation:
        """The same request, of whose answer ``given`` has come from a replica that is gone."""
        return replace(self, given=given, version=version)
