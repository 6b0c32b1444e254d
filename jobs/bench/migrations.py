"""What moving layers between stages costs: the pause, beside that of moving everything at once.

Four workers in two stages; one is drained and replaced, again and again. With three workers the cut is 2 : 1
and with four it is even, so at every change, leave or join, a layer goes over to the other stage and the
state of all layers is divided among other workers. The baseline is a run with the same leaves and joins, but
nobody goes on before optimizer state and copies for backups have come too: the model's builder, which runs in
every worker's process, wraps ``Mover.move`` (``traced.build``, ``at_once``).

The pause is what a change adds to a step boundary, by the workers' spans: from the last update's end until
the last worker that stays goes on, less the same time at the old plan's undisturbed boundaries, where that is
when the last one has gathered. So neither the workers' reaching the boundary one after the other counts as a
pause, which they do at every step, nor is anything hidden that is sent while parameters are gathered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from rich.console import Console

from jobs.bench.traced import build
from jobs.bench.watched import Spans, excess, recipe, row, watched
from runtime.change import boundary_transfers
from runtime.events import Event, StepRecord, WorkerJoined, WorkerLeft
from runtime.layout import Layout
from runtime.plan import Plan
from strategies.model import build_model

GOAL = 0.20
"""Of the pause of moving everything at once."""

CYCLES = 5
"""Of a leave and a join each, for either way of moving."""

WORKERS, LAYERS, FORWARD_SECONDS = 4, 6, 0.010
PARAMETERS = 5_000_000
"""In each layer: 20 MB of parameters, 40 MB of moments."""

STEPS = 2
LEAVE, JOIN = "leave", "join"


@dataclass(frozen=True, slots=True)
class Migration:
    """One change. Seconds: ``pause`` as above, ``stood_still`` and ``excess`` as of ``joins``.
    ``parameter_bytes`` are what had to come before the next forward, of ``total_bytes``, all workers
    together."""

    kind: str
    pause: float
    stood_still: float
    excess: float
    moved_layers: int
    parameter_bytes: int
    total_bytes: int


def moved_layers(old: Plan, new: Plan) -> int:
    """How many layers a worker that stays had not held before, at most."""
    most = 0
    for worker in set(old.workers) & set(new.workers):
        before, after = (plan.stages[plan.stage_of(worker)] for plan in (old, new))
        both = min(before.stop, after.stop) - max(before.first, after.first)
        most = max(most, after.stop - after.first - max(both, 0))
    return most


def gathering(spans: Spans, until: float | None = None) -> float:
    """Seconds from the last worker's update in a step until its parameters have been gathered everywhere, or
    ``until`` then. Raises ValueError where no spans of that were kept."""
    updated, gathered = (
        max(ended for of_worker in spans.values() for kind, _, ended in of_worker if kind == wanted)
        for wanted in ("optimizer", "gather")
    )
    return (gathered if until is None else until) - updated


def pause_of(timeline: Mapping[int, Spans], steps: Sequence[StepRecord], old: Plan, new: Plan) -> float:
    """What the change from ``old`` to ``new`` added to its boundary. Raises ValueError where that, or no
    other boundary of ``old``, is in the timeline."""
    before = [record.step for record in steps if record.generation == old.generation]
    boundary = before.pop()
    staying = set(old.workers) & set(new.workers)
    following = timeline.get(boundary + 1, {})
    gone_on = [
        ended
        for worker, of_worker in following.items()
        for kind, _, ended in of_worker
        if kind == "recovery" and worker in staying
    ]
    usual = [gathering(timeline[step]) for step in before if step in timeline]
    if len(gone_on) < len(staying) or not usual or boundary not in timeline:
        raise ValueError(f"the timeline lacks the change after step {boundary}, or what to compare it with")
    return gathering(timeline[boundary], max(gone_on)) - median(usual)


def migration(
    kind: str, layout: Layout, old: Plan, new: Plan, pause: float, stood_still: float, next_step_longer: float
) -> Migration:
    """What moved follows from the plans alone, as it does for the controller."""
    transfers = boundary_transfers(layout, old, new)
    first = sum(transfer.bytes for transfer in transfers if transfer.what == "parameters")
    total = sum(transfer.bytes for transfer in transfers)
    return Migration(kind, pause, stood_still, next_step_longer, moved_layers(old, new), first, total)


def _run(folder: Path, *, at_once: bool) -> list[Migration]:
    name = "at-once" if at_once else "migrations"
    model = {"parameters": PARAMETERS, "at_once": at_once}
    plans: list[Plan] = []
    timeline: dict[int, Spans] = {}
    with watched(recipe(name, WORKERS, LAYERS, FORWARD_SECONDS, **model), folder / name) as run:
        for number in range(CYCLES):
            plans.append(run.whole(STEPS, number))
            run.drain(plans[-1].stages[0].workers[-1])
            plans.append(run.smaller(STEPS))
            timeline |= run.timeline()  # it forgets most of what is long ago
        plans.append(run.whole(STEPS, CYCLES))
        timeline |= run.timeline()
        return migrations_of(run.steps(), [each.event for each in run.events()], plans, timeline)


def migrations_of(
    steps: Sequence[StepRecord],
    events: Sequence[Event],
    plans: Sequence[Plan],
    timeline: Mapping[int, Spans],
) -> list[Migration]:
    """From a run's records, and its log of one leave or join between every two plans."""
    # the layout is that of what the workers build, and does not depend on how they move it
    layers, loss = build(layers=LAYERS, forward_seconds=FORWARD_SECONDS, parameters=PARAMETERS)
    layout = build_model(lambda: (layers, loss), 0).layout
    logged = [event for event in events if isinstance(event, WorkerLeft | WorkerJoined)]
    return [
        migration(
            LEAVE if isinstance(event, WorkerLeft) else JOIN,
            layout,
            old,
            new,
            pause_of(timeline, steps, old, new),
            event.seconds,
            excess(steps, new.generation),
        )
        for event, (old, new) in zip(logged, pairwise(plans), strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Migrations:
    """Of the same changes, made in both ways."""

    ahead: list[Migration]
    """Parameters ahead of everything else."""
    at_once: list[Migration]

    def share(self, kind: str) -> float:
        """The pause, as a share of that of moving everything at once; medians of one kind of change."""
        return _pause(self.ahead, kind) / _pause(self.at_once, kind)

    @property
    def worst_share(self) -> float:
        return max(self.share(kind) for kind in (LEAVE, JOIN))


def _pause(migrations: Sequence[Migration], kind: str) -> float:
    return median(each.pause for each in migrations if each.kind == kind)


def measure(folder: Path, console: Console) -> Migrations:
    """Both runs, one after the other."""
    found = Migrations(_run(folder, at_once=False), _run(folder, at_once=True))
    for kind in (LEAVE, JOIN):
        console.print(
            f"migration, {kind}: {_pause(found.ahead, kind) * 1e3:.0f} ms, at once "
            f"{_pause(found.at_once, kind) * 1e3:.0f} ms",
            highlight=False,
        )
    return found


def rows(found: Migrations) -> list[Mapping[str, str | float | int | None]]:
    """Of the table: each kind of change, parameters first, then everything at once."""
    result = []
    for kind in (LEAVE, JOIN):
        for name, all_migrations in (("parameters first", found.ahead), ("all at once", found.at_once)):
            migrations = [each for each in all_migrations if each.kind == kind]
            ahead = all_migrations is found.ahead
            moved = [each.parameter_bytes if ahead else each.total_bytes for each in migrations]
            result.append(
                row(
                    f"migration, {kind}: {name}",
                    len(migrations),
                    pause_ms=1e3 * median(each.pause for each in migrations),
                    worst_ms=1e3 * max(each.pause for each in migrations),
                    of_ms=1e3 * _pause(found.at_once, kind) if ahead else None,
                    share=found.share(kind) if ahead else None,
                    next_step_longer_ms=1e3 * median(each.excess for each in migrations),
                    moved_mb=median(moved) / 1e6,
                )
            )
    return result


def note(found: Migrations) -> str:
    """What the table does not show: which layers moved, and how much state in all."""
    every = []
    for name, all_migrations in (("parameters first", found.ahead), ("all at once", found.at_once)):
        for kind in (LEAVE, JOIN):
            these = [each for each in all_migrations if each.kind == kind]
            longest = 1e3 * median(each.stood_still for each in these)
            layers = "/".join(str(each.moved_layers) for each in these)
            megabytes = "/".join(f"{each.total_bytes / 1e6:.0f}" for each in these)
            every.append(f"{name}, {kind}: {longest:.0f} ms, {layers} layers, {megabytes} MB")
    return (
        f"migration: layers of {12 * PARAMETERS / 1e6:.0f} MB of state each; moved_mb is what had to come, "
        "to all workers together, before the next forward. All at once is a run of its own in which "
        "Mover.move is wrapped so that it returns when all state has come; the planner goes by measured "
        "seconds, so its cuts may differ. pause_ms is what a change adds to a boundary, from the last "
        "update until the last one who stays goes on. For how long the one that waited longest stood at the "
        "boundary (median), most layers that one who stays took over, and state moved in all: "
        + "; ".join(every)
    )
