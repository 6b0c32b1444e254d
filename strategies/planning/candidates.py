"""Divisions of layers and workers worth weighing: from the least change to a fresh cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, pairwise

import numpy as np

from runtime.plan import Member, Plan, WorkerId
from strategies.planning.costs import Division, Predictor
from strategies.planning.partition import cut_for_groups, cut_for_many, cut_layers, group_sizes

MOST_SIZES = 400
"""Up to how many ways to size the groups are weighed. There are 64 for 16 workers in 4 stages; beyond, a
group has so many workers that one more or less hardly matters."""

MANY = 200
"""More workers than this are not weighed one by one."""

SIZED = 8
"""How many of them, the best by the closed formula, become candidates."""


def divisions_of(
    predictor: Predictor,
    spread: Sequence[WorkerId],
    counts: Sequence[int],
    previous: Plan | None,
    *,
    limited: bool,
) -> dict[Division, str]:
    """Every candidate with ``counts`` stages or as many as ``previous``, if that is among them, and
    its name. ``limited``: leave out cuts that cannot fit the workers' memory (a candidate may still
    not fit). Deterministic; the same division is listed once, under the name of the least change.
    ``spread``: the workers in the order of ``spread_over_domains``."""
    found: dict[Division, str] = {}
    if previous is not None and len(previous.stages) in counts:
        bounds = (0, *(stage.stop for stage in previous.stages))
        kept = _keep_groups(predictor, previous, bounds, spread)
        if kept is not None:
            found[kept] = "kept the cut and re-dealt micro-batches"
            found.setdefault(_recut(predictor, kept.groups), "kept the groups and cut the layers anew")
        regrouped_sizes = _regroup(predictor, bounds, len(spread))
        regrouped = Division(bounds, nearest_groups(predictor, previous, bounds, regrouped_sizes, spread))
        found.setdefault(regrouped, "kept the cut and regrouped workers")

    stage_before = {w: k for k, s in enumerate(previous.stages) for w in s.workers} if previous else {}
    order = sorted(spread, key=lambda worker: stage_before.get(worker, len(stage_before)))
    speeds = [predictor.speed[worker] for worker in order]
    fewest = predictor.fewest_workers() if limited else None
    for count in counts:
        cut = cut_layers(predictor.layer_seconds, speeds, predictor.micro_batches, count, fewest)
        if cut is not None:
            groups = _joined(predictor, cut.bounds, _runs(order, cut.sizes), order[sum(cut.sizes) :])
            anew = Division(cut.bounds, groups)
            found.setdefault(anew, "cut the layers anew")
            if previous is not None:
                near = nearest_groups(predictor, previous, cut.bounds, [len(g) for g in groups], spread)
                found.setdefault(Division(cut.bounds, near), "cut the layers anew")
        # Even groups load the busiest a little more, but a pipeline of equals has fewer gaps.
        smaller, larger = divmod(len(order), count)
        front = tuple(smaller + (k < larger) for k in range(count))
        for sizes in dict.fromkeys((front, front[::-1])):
            even = _recut(predictor, tuple(_runs(order, sizes)))
            if previous is not None:
                even = _recut(predictor, nearest_groups(predictor, previous, even.bounds, sizes, spread))
            found.setdefault(even, "evened the groups and cut the layers anew")
    return found


def sized_divisions(
    predictor: Predictor,
    spread: Sequence[WorkerId],
    counts: Sequence[int],
    previous: Plan | None,
    memory_limit: float | None,
) -> dict[Division, str]:
    """The best divisions over all group sizes, by the closed formula, that fit ``memory_limit``.

    The dynamic programme of ``cut_layers`` finds one cut with the least largest load. Many have nearly
    the same load and less to fill and drain: this looks at all group sizes, each with its own best cut.
    Slow workers share a group; which one it is, is part of the choice.
    """
    alike = predictor.alike(spread)
    order = list(spread) if alike else sorted(spread, key=predictor.speed.__getitem__)
    found: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []
    for count in counts:
        if len(order) % count == 0 and alike:
            continue  # equal groups of equals: no size is better for all models, and none is as plain
        sizes_CK = np.array(
            list(islice(_sized(len(order), count, alike=alike), MOST_SIZES + 1)), dtype=np.int64
        )
        if len(sizes_CK) > MOST_SIZES:
            continue
        ends_CK = sizes_CK.cumsum(axis=1)
        spans = {(stop - size, stop) for size, stop in zip(sizes_CK.flat, ends_CK.flat, strict=True)}
        weight = {span: predictor.fill_weight(tuple(order[span[0] : span[1]])) for span in spans}
        weights_CK = np.array(
            [
                [weight[stop - size, stop] for size, stop in zip(sizes, ends, strict=True)]
                for sizes, ends in zip(sizes_CK, ends_CK, strict=True)
            ]
        )
        bounds_CB = cut_for_many(predictor.layer_seconds, weights_CK)
        seconds_C, bytes_C = predictor.many(bounds_CB, sizes_CK, weights_CK)
        fits_C = bytes_C <= (np.inf if memory_limit is None else memory_limit)
        best = np.flatnonzero(fits_C)[np.argsort(seconds_C[fits_C], kind="stable")[:SIZED]]
        found += [
            (float(seconds_C[c]), tuple(bounds_CB[c].tolist()), tuple(sizes_CK[c].tolist())) for c in best
        ]
    divisions: dict[Division, str] = {}
    for _, bounds, sizes in sorted(found)[:SIZED]:
        groups = tuple(_runs(order, sizes))
        if previous is not None and alike:
            groups = nearest_groups(predictor, previous, bounds, sizes, order)
        divisions[_recut(predictor, groups)] = "weighed all group sizes"
        divisions[_recut(predictor, groups[::-1])] = "weighed all group sizes"
    return divisions


def _sized(workers: int, count: int, *, alike: bool) -> Iterator[tuple[int, ...]]:
    """Group sizes, and where speeds differ, each distinct size as that of the slowest workers' group."""
    for sizes in group_sizes(workers, count):
        for k, size in enumerate(sizes):
            if k == 0 or not (alike or size == sizes[k - 1]):
                yield (size, *sizes[:k], *sizes[k + 1 :])


def _runs(order: Sequence[WorkerId], sizes: Sequence[int]) -> list[tuple[WorkerId, ...]]:
    return [
        tuple(sorted(order[stop - size : stop])) for size, stop in zip(sizes, accumulate(sizes), strict=True)
    ]


def _recut(predictor: Predictor, groups: tuple[tuple[WorkerId, ...], ...]) -> Division:
    weights = [predictor.fill_weight(group) for group in groups]
    return Division(cut_for_groups(predictor.layer_seconds, weights), groups)


def spread_over_domains(members: Sequence[Member]) -> list[WorkerId]:
    """Members in turn from every failure domain, so that a run of them, a stage group, spans several
    and outlives the loss of one; by ascending id inside a domain."""
    taken: dict[str, int] = {}
    turns = []
    for member in members:
        turn = taken.get(member.domain, 0)
        taken[member.domain] = turn + 1
        turns.append((turn, member.worker))
    return [worker for _, worker in sorted(turns)]


def _joined(
    predictor: Predictor,
    bounds: tuple[int, ...],
    groups: Sequence[tuple[WorkerId, ...]],
    newcomers: Sequence[WorkerId],
) -> tuple[tuple[WorkerId, ...], ...]:
    """Every newcomer in turn joins the stage that is the busiest by then."""
    seconds = [predictor.seconds_of(first, stop) for first, stop in pairwise(bounds)]
    alike = predictor.alike([*newcomers, *(worker for group in groups for worker in group)])
    sizes = [len(group) for group in groups]
    power = [predictor.power(group) for group in groups]
    joining: list[list[WorkerId]] = [[] for _ in groups]

    def load(k: int) -> float:
        # whole rounds where all are equally fast, else as if micro-batches could be divided
        rounds = -(-predictor.micro_batches // sizes[k]) if alike else predictor.micro_batches / power[k]
        return seconds[k] * rounds

    for worker in newcomers:
        k = max(range(len(groups)), key=load)
        joining[k].append(worker)
        sizes[k] += 1
        power[k] += predictor.speed[worker]
    return tuple(
        tuple(sorted((*group, *more))) if more else group for group, more in zip(groups, joining, strict=True)
    )


def _keep_groups(
    predictor: Predictor, previous: Plan, bounds: tuple[int, ...], spread: Sequence[WorkerId]
) -> Division | None:
    """Survivors stay; new workers first fill empty stages, then join whichever is the busiest."""
    present = set(spread)
    groups = [tuple(w for w in stage.workers if w in present) for stage in previous.stages]
    stayed = {worker for group in groups for worker in group}
    newcomers = sorted((w for w in spread if w not in stayed), key=lambda w: -predictor.speed[w])
    while newcomers and () in groups:
        groups[groups.index(())] = (newcomers.pop(0),)
    return None if () in groups else Division(bounds, _joined(predictor, bounds, groups, newcomers))


def _regroup(predictor: Predictor, bounds: tuple[int, ...], workers: int) -> list[int]:
    """Group sizes for a fixed cut: each next worker goes where a micro-batch round takes longest."""
    seconds = [predictor.seconds_of(first, stop) for first, stop in pairwise(bounds)]
    spare = workers - len(seconds)
    # of many, most go in proportion: one by one is for the rest
    shares = [max(int(0.9 * spare * each / sum(seconds)), 0) if spare > MANY else 0 for each in seconds]
    sizes = [1 + share for share in shares]
    for _ in range(workers - sum(sizes)):
        k = max(range(len(sizes)), key=lambda k: seconds[k] * -(-predictor.micro_batches // sizes[k]))
        sizes[k] += 1
    return sizes


def nearest_groups(
    predictor: Predictor,
    previous: Plan | None,
    bounds: tuple[int, ...],
    sizes: Sequence[int],
    spread: Sequence[WorkerId],
) -> tuple[tuple[WorkerId, ...], ...]:
    """Groups of these sizes in which workers keep as many parameter bytes as a greedy match finds."""
    if previous is None:
        return tuple(_runs(spread, sizes))
    present = set(spread)
    waiting = [[w for w in stage.workers if w in present] for stage in previous.stages]
    groups: list[list[WorkerId]] = [[] for _ in sizes]
    overlaps = sorted(
        (-predictor.bytes_of(max(old.first, bounds[k]), min(old.stop, bounds[k + 1])), o, k)
        for o, old in enumerate(previous.stages)
        for k in range(len(sizes))
        if max(old.first, bounds[k]) < min(old.stop, bounds[k + 1])
    )
    for _, o, k in overlaps:
        count = min(len(waiting[o]), sizes[k] - len(groups[k]))
        groups[k] += waiting[o][:count]
        del waiting[o][:count]
    placed = {worker for group in groups for worker in group}
    rest = iter([worker for worker in spread if worker not in placed])
    for group, size in zip(groups, sizes, strict=True):
        group.extend(next(rest) for _ in range(size - len(group)))
    return tuple(tuple(sorted(group)) for group in groups)
