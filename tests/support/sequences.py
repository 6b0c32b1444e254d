"""Models that can be computed in slices, and teams of threads that compute them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jobs.models import gpt
from runtime.fabric.inprocess import InProcessFabric
from runtime.fabric.interface import Tag
from strategies.model import build_model, flat_parameters
from strategies.options import Precision
from strategies.sequence.division import dealt, slice_bounds
from strategies.sequence.exchange import Exchange
from strategies.sequence.stage import SequenceStage
from strategies.stage import LayerTimes
from tests.support.models import Tokens

CPU = torch.device("cpu")
HEADS, TOKENS, WIDTH = 3, 11, 24

build_gpt: Callable[[], tuple[list[nn.Module], Any]] = partial(
    gpt.build, width=WIDTH, depth=2, heads=HEADS, context=TOKENS, vocabulary=37, dropout=0.2
)
"""Three heads and eleven tokens: neither divides evenly."""


def long_tokens() -> Tokens:
    return Tokens(5, length=TOKENS)


build_ladder = partial(build_gpt, ladder=True)
"""The same with ladder residuals."""


def elements_sent(tokens: int, slices: int, heads: int, team: int, widths: tuple[int, int]) -> list[int]:
    """What every member of a team of ``team`` sends of one sample in the forward of an attention: its
    slices to the others' heads (``widths[0]`` elements a token and head: queries, keys and values) and its
    heads to the others' slices (``widths[1]``). Backward it is the same with the widths exchanged.

    With N tokens and a width of h that divide evenly it is the 4 (N / P) h (P - 1) / P of Jacobs et al.,
    "DeepSpeed Ulysses" (2023), sec. 3.
    """
    bounds = slice_bounds(tokens, slices)
    sent = []
    for mine, own_heads in zip(dealt(slices, team), dealt(heads, team), strict=True):
        held = bounds[mine.stop] - bounds[mine.start]
        out, back = held * (heads - len(own_heads)), (tokens - held) * len(own_heads)
        sent.append(out * widths[0] + back * widths[1])
    return sent


class Sums:
    """What one or more workers have summed of a micro-batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.sums: dict[int, Tensor] = {}
        self.bytes_sent: list[int] = []
        self.times: list[LayerTimes] = []


def make_stage(
    slices: int, build: Any = build_gpt, lock: Any = None, layers: tuple[int, int] = (0, 4), **precision: Any
) -> SequenceStage:
    model = build_model(build, seed=7)
    flats = {block.index: flat_parameters(model, block) for block in model.layout.blocks}
    made = SequenceStage(
        model,
        slices=slices,
        seed=7,
        precision=Precision(**precision),
        device=CPU,
        exact=True,
        compute_lock=lock,
    )
    made.hold(layers)
    for block, working_N in made.working.items():
        working_N.copy_(flats[block])
    made.clear_gradients()
    return made


def in_a_team(
    size: int, slices: int, *, deferred: bool = False, build: Any = build_gpt, **precision: Any
) -> Sums:
    """Forward and backward of one micro-batch by ``size`` threads; sums are those of all together."""
    fabric, lock = InProcessFabric(), threading.Lock()
    endpoints = [fabric.endpoint(worker) for worker in range(size)]
    stages = [make_stage(slices, build, lock=lock, **precision) for _ in range(size)]
    inputs, targets = long_tokens().micro_batch(3, 1)
    found = Sums()
    losses: dict[int, float] = {}
    errors: list[BaseException] = []

    def work(place: int) -> None:
        stage, endpoint = stages[place], endpoints[place]
        tag = Tag(0, 1, 1, "team")
        team = tuple(range(size))
        exchange = Exchange(slices, team, place, endpoint, tag, endpoint.receive)
        own = exchange.own
        try:
            with stage.together(exchange):
                mine = {s: part for s, part in stage.split(inputs).items() if s in own}
                value, kept = stage.forward(3, 1, mine, train=True, check=endpoint.check)
                wanted = [stage.split_targets(targets)[s] for s in own]
                each, gradients = stage.losses_of(value, wanted, train=True)
                losses.update(zip(own, [loss for loss, _ in each], strict=True))
                exponents = [30] * len(stage.layout.tensors)
                put_off: list[Any] | None = [] if deferred else None
                stage.backward(3, 1, kept, gradients, exponents, check=endpoint.check, deferred=put_off)
                if put_off is not None:
                    stage.weight_gradients(put_off, exponents, check=endpoint.check)
        except BaseException as error:
            errors.append(error)
            fabric.close()

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    found.bytes_sent = [endpoint.statistics()["bytes_sent"] for endpoint in endpoints]
    found.times = [stage.take_times() for stage in stages]
    fabric.close()
    found.losses = [losses[s] for s in range(slices)]
    blocks = stages[0].summed()
    found.sums = {block: sum(s.summed()[block] for s in stages) for block in blocks}  # type: ignore[misc]
    return found
