"""What layers cost where a team computes them, or where their parameters come from the host: layer by layer.

Both change what each layer costs and nothing else of the search's sums, so that a form of the work is a
cost model of its own: that of a team's member that has most. An exchange within a team is waited for, and its
messages are on their way together. Of a layer whose parameters come while the one before computes, the longer
of the two counts, as if every layer came anew for each forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from runtime.plan import Strategy
from strategies.planning.costs import CostModel
from strategies.sequence.sharing import Sharing, slice_share


@dataclass(frozen=True, slots=True)
class Form:
    """Teams of ``team`` workers; parameters that are ``offloaded``."""

    team: int = 1
    offloaded: bool = False


PLAIN = Form()


def form_of(strategy: Strategy) -> Form:
    return Form(strategy.sequence, strategy.offload is not None)


def costs_in_form(costs: CostModel, form: Form, speed: float) -> tuple[CostModel, tuple[float, ...]]:
    """(``costs`` in that form, every layer's forward where it is computed again), for workers of ``speed``,
    by which all seconds will be divided. Teams need ``costs.sharing``."""
    team, slices = form.team, costs.slices or form.team
    assert costs.sharing or team == 1, "teams are weighed where it is known how they divide the layers"
    sharing = costs.sharing or (Sharing(),) * len(costs.forward_seconds)
    unlike = {*sharing}  # few
    ratio_of = {layer: layer.ratio(team, slices) for layer in unlike}
    ratios = [ratio_of[layer] for layer in sharing]
    # what goes over links takes as long whatever the workers' speed
    exchange_of = {
        layer: speed
        * (
            layer.sent_bytes(team, slices) / costs.link_bytes_per_second
            + layer.waits(team) * costs.link_seconds_per_message
        )
        for layer in unlike
    }
    exchanges = [exchange_of[layer] for layer in sharing]
    arrivals = [
        speed * each / costs.host_bytes_per_second if form.offloaded else 0.0
        for each in costs.parameter_bytes
    ]
    again = tuple(f * ratio for f, ratio in zip(costs.forward_seconds, ratios, strict=True))
    forward = [max(f + x, t) for f, x, t in zip(again, exchanges, arrivals, strict=True)]
    backward, split = [], []
    halves = [(each / 2, each / 2) for each in costs.backward_seconds]
    each_layer = zip(
        costs.backward_seconds, costs.split_seconds or halves, ratios, exchanges, arrivals, strict=True
    )
    for whole, (inputs, weights), ratio, exchange, arrival in each_layer:
        backward.append(max(whole * ratio + exchange, arrival))
        inputs, weights = inputs * ratio + exchange, weights * ratio
        split.append((max(inputs, arrival - weights), weights))
    by_slice = slice_share(team, slices)
    boundary = costs.boundary_bytes or (0,) * len(sharing)
    share_of = {layer: layer.kept_share(team, slices) for layer in unlike}
    kept = []
    for all_, output, layer in zip(costs.kept_bytes or (0,) * len(sharing), boundary, sharing, strict=True):
        beside = max(all_ - output, 0)
        kept.append(_part(all_ - beside, by_slice) + _part(beside, share_of[layer]))
    changed = replace(
        costs,
        forward_seconds=tuple(forward),
        backward_seconds=tuple(backward),
        split_seconds=tuple(split),
        boundary_bytes=tuple(_part(each, by_slice) for each in costs.boundary_bytes),
        kept_bytes=tuple(kept),
        entry_bytes=_part(costs.entry_bytes, by_slice),
    )
    return changed, again


def _part(bytes_: int, share: Fraction) -> int:
    return -(-bytes_ * share.numerator // share.denominator)
