"""A stage's layers: gradients do not depend on the cut, dropout not on who draws before."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime.exact import next_exponents
from strategies.model import build_model, flat_parameters
from strategies.options import Precision
from strategies.share import contributions
from strategies.stage import Activation, StageModel
from tests.support.models import Tokens, build
from tests.support.values import build_values

CPU = torch.device("cpu")
LAYERS = 5


def go_on() -> None:
    """The check of a worker that nobody interrupts."""


def stage(first: int, stop: int, builder: Any = build, *, exact: bool = True, **precision: Any) -> StageModel:
    """Layers ``first`` to ``stop - 1`` with their parameters as first built."""
    model = build_model(builder, seed=7)
    flats = {block.index: flat_parameters(model, block) for block in model.layout.blocks}
    made = StageModel(model, seed=7, precision=Precision(**precision), device=CPU, exact=exact)
    made.hold((first, stop))
    fill(made, flats)
    return made


def fill(made: StageModel, flats: dict[int, Tensor]) -> None:
    for block, working_N in made.working.items():
        working_N.copy_(flats[block])


def train(stages: list[StageModel], step: int, micro_batch: int, exponents: Any) -> tuple[float, int]:
    """One micro-batch through all stages and back."""
    inputs, targets = Tokens(5).micro_batch(step, micro_batch)
    value, kept = inputs, []
    for each in stages:
        value, activations = each.forward(step, micro_batch, value, train=True, check=go_on)
        kept.append(activations)
    loss, count, gradients = stages[-1].loss_of(value, targets, train=True)
    for each, activations in zip(reversed(stages), reversed(kept), strict=True):
        each.backward(step, micro_batch, activations, gradients, exponents, check=go_on)
    return loss, count


def sums(stages: list[StageModel], order: list[int]) -> tuple[dict[int, Tensor], dict[int, float]]:
    """Exact sums by block over all stages, and losses by micro-batch, taken in ``order``."""
    layout = stages[0].layout
    for each in stages:
        each.clear_gradients()
    for micro_batch in order:
        train(stages, 1, micro_batch, None)
    maxima_T = torch.stack([each.maxima_T for each in stages]).amax(0)
    exponents = next_exponents(maxima_T, contributions(layout, len(order))).tolist()
    for each in stages:
        each.clear_gradients()
    losses = {micro_batch: train(stages, 1, micro_batch, exponents)[0] for micro_batch in order}
    totals: dict[int, Tensor] = {}
    for each in stages:
        for block, sums_N in each.summed().items():
            totals[block] = totals.get(block, 0) + sums_N
    return totals, losses


@pytest.mark.parametrize("builder", [build, build_values], ids=["tensors", "values"])
@pytest.mark.parametrize("cuts", [[0, -1], [0, 1, -1], [0, 2, 3, -1]])
@pytest.mark.parametrize("recompute", [(), (0, 1, 3)])
def test_sums_depend_neither_on_cut_nor_on_order(
    builder: Any, cuts: list[int], recompute: tuple[int, ...]
) -> None:
    layers = len(builder()[0])
    bounds = [layers if cut == -1 else cut for cut in cuts]
    whole, losses = sums([stage(0, layers, builder)], [0, 1, 2, 3])
    cut = [stage(first, stop, builder, recompute=recompute) for first, stop in pairwise(bounds)]
    parts, part_losses = sums(cut, [2, 0, 3, 1])
    assert part_losses == losses and len(set(losses.values())) == 4
    assert parts.keys() == whole.keys()
    for block, total_N in whole.items():
        assert parts[block].equal(total_N)
        assert total_N.any(), f"block {block} has gradients"


@pytest.mark.parametrize("builder", [build, build_values], ids=["tensors", "values"])
@pytest.mark.parametrize("recompute", [(), (0, 1, 3)])
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_backward_in_two_parts_has_the_bits_of_one(
    builder: Any, recompute: tuple[int, ...], interrupted: bool
) -> None:
    """All input gradients first, then the weights'; ``interrupted`` before every single layer."""
    layers = len(builder()[0])
    whole, split = (stage(0, layers, builder, recompute=recompute) for _ in range(2))
    exponents = [20] * len(whole.layout.tensors)
    for each in (whole, split):
        each.clear_gradients()
    put_off: list[list[Activation]] = []
    for micro_batch in range(3):
        train([whole], 1, micro_batch, exponents)
        inputs, targets = Tokens(5).micro_batch(1, micro_batch)
        value, activations = split.forward(1, micro_batch, inputs, train=True, check=go_on)
        gradients = split.loss_of(value, targets, train=True)[2]
        deferred: list[Activation] = []
        backward = partial(
            split.backward, 1, micro_batch, activations, gradients, exponents, deferred=deferred
        )
        again_and_again(backward, interrupted)
        put_off.append(deferred)
    assert not any(total_N.any() for total_N in split.summed().values()), "nothing is summed so far"
    for deferred in put_off:
        assert len(deferred) > 1
        again_and_again(partial(split.weight_gradients, deferred, exponents), interrupted)
    for block, total_N in whole.summed().items():
        assert total_N.any() and split.summed()[block].equal(total_N)
    assert split.maxima_T.equal(whole.maxima_T)


def again_and_again(work: Any, interrupted: bool) -> None:
    """Calls ``work`` until it ends; ``interrupted``: every call gets through one layer only."""
    left = [2 if interrupted else 1 << 30]

    def check() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Halt

    while True:
        try:
            return work(check=check)
        except Halt:
            left[0] = 2


def test_recomputed_layers_keep_no_outputs() -> None:
    made = stage(0, LAYERS, recompute=(1, 3))
    _, activations = made.forward(1, 0, Tokens(5).micro_batch(1, 0)[0], train=True, check=go_on)
    assert [activation.outputs is None for activation in activations] == [False, True, False, True, False]


def test_dropout_is_keyed_by_step_micro_batch_and_layer() -> None:
    made = stage(0, 2)
    tokens = Tokens(5).micro_batch(1, 0)[0]

    def output(step: int, micro_batch: int) -> Tensor:
        torch.rand(17)  # whatever was drawn before does not matter
        value, _ = made.forward(step, micro_batch, tokens, train=True, check=go_on)
        assert isinstance(value, Tensor)
        return value

    assert output(1, 0).equal(output(1, 0))
    assert not output(1, 0).equal(output(1, 1))
    assert not output(1, 0).equal(output(2, 0))


def test_evaluation_drops_nothing_and_keeps_nothing() -> None:
    made, plain = stage(0, LAYERS), stage(0, LAYERS, partial(build, dropout=0.0))
    tokens, targets = Tokens(5).held_out(0)
    value, activations = made.forward(3, 1, tokens, train=False, check=go_on)
    expected, _ = plain.forward(1, 0, tokens, train=True, check=go_on)
    assert activations == [] and value.equal(expected) and not value.requires_grad
    assert made.loss_of(value, targets, train=False)[2] == []
    trained, _ = made.forward(3, 1, tokens, train=True, check=go_on)
    assert not trained.equal(value), "back in training, dropout is on again"


def test_layers_come_and_go_and_kept_blocks_stay() -> None:
    made = stage(0, 3)
    kept = {block: made.working[block] for block in made.working}
    made.hold((1, 4))
    layout = made.layout
    held = {block.index for block in layout.blocks_of(1, 4)}
    assert made.working.keys() == made.version.keys() == made.accumulators.keys() == held
    for block in held & kept.keys():
        assert made.working[block] is kept[block]
    assert [made.version[block] for block in sorted(held - kept.keys())] == [None]
    sizes = [sum(p.numel() for p in layer.parameters()) > 0 for layer in made._layers]
    assert sizes == [False, True, True, True, False], "layers that are not held take no memory"


def test_parameters_are_views_of_the_working_vector() -> None:
    made = stage(1, 2)
    (block,) = made.working
    made.working[block].fill_(0.25)
    assert all(bool((p == 0.25).all()) for p in made._layers[1].parameters())


def test_ends_of_a_tie_are_apart_until_they_share_a_stage() -> None:
    both = stage(0, LAYERS)
    first, last = both._layers[0].get_parameter("table.weight"), both._layers[-1].get_parameter("weight")
    assert first is not last and first.data_ptr() == last.data_ptr()


class Halt(Exception):
    pass


def test_an_interrupt_is_seen_between_two_layers() -> None:
    made = stage(0, LAYERS)
    seen: list[int] = []

    def check() -> None:
        seen.append(len(seen))
        if len(seen) == 3:
            raise Halt

    with pytest.raises(Halt):
        made.forward(1, 0, Tokens(5).micro_batch(1, 0)[0], train=True, check=check)
    assert made.take_times().forward.keys() == {0, 1}


class Detached(nn.Module):
    """Lets no gradient through to what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.linear(x_BTD.detach())


def test_no_gradient_flows_through_a_detached_input() -> None:
    def builder() -> Any:
        layers, loss = build()
        layers[2] = Detached()
        return layers, loss

    made = stage(0, LAYERS, builder)
    made.clear_gradients()
    train([made], 1, 0, [20] * len(made.layout.tensors))
    by_layer = {block.layers: bool(made.summed()[block.index].any()) for block in made.layout.blocks}
    assert by_layer[(1,)] is False and by_layer[(2,)] is True and by_layer[(0, 4)] is True


@pytest.mark.parametrize("exact", [True, False])
def test_cleared_sums_start_anew(exact: bool) -> None:
    """Where nothing is added they are zeros; a probing pass adds nothing."""
    made = stage(0, LAYERS, exact=exact)
    exponents = [20] * len(made.layout.tensors)
    made.clear_gradients()
    train([made], 1, 0, exponents)
    once = {block: total.clone() for block, total in made.summed().items()}
    train([made], 1, 1, exponents)
    made.clear_gradients()
    if exact:
        train([made], 1, 1, None)
    train([made], 1, 0, exponents)
    assert all(made.summed()[block].equal(total) for block, total in once.items())
    made.clear_gradients()
    assert not any(total.any() for total in made.summed().values())


def test_fast_sums_are_plain_float32_sums() -> None:
    made = stage(0, LAYERS, exact=False)
    made.clear_gradients()
    train([made], 1, 0, None)
    assert {total.dtype for total in made.summed().values()} == {torch.float32}
    once = {block: total.clone() for block, total in made.summed().items()}
    train([made], 1, 0, None)
    single = [block.index for block in made.layout.blocks if len(block.layers) == 1]
    assert all(made.summed()[block].equal(2 * once[block]) for block in single)


def test_times_are_taken_per_layer_and_micro_batch() -> None:
    made = stage(1, 3)
    x_BTD = torch.randn(2, 5, 24)
    for micro_batch in range(2):
        _, activations = made.forward(1, micro_batch, x_BTD, train=True, check=go_on)
        made.backward(1, micro_batch, activations, [torch.ones(2, 5, 24)], None, check=go_on)
    times = made.take_times()
    assert times.forward.keys() == times.backward.keys() == {1, 2}
    assert times.micro_batches == {1: 2, 2: 2}
    assert made.take_times().forward == {}
