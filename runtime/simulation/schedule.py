"""Random fault schedules: a seed says how large the run is and what befalls it when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Literal

from runtime.events import DrainNotice, Resized, WorkerLeft, WorkerLost
from runtime.plan import WorkerId
from runtime.simulation.checks import Violation, check
from runtime.simulation.cluster import SimCluster
from runtime.simulation.journal import Journal
from runtime.simulation.settings import Planner, Settings, Stages
from runtime.simulation.toy import Cut, ToyModel, toy_layout

Kind = Literal[
    "kill",
    "lose domain",
    "lose machines",
    "stop",
    "stick",
    "slow",
    "drain",
    "resize",
    "cut off",
    "cut in two",
    "cut from controller",
    "reset link",
    "kill controller",
    "stall controller",
    "stop the run",
]

PLANNED: tuple[Kind, ...] = ("drain", "slow", "resize")
"""Kinds that must not cost any work, and interrupt nobody."""

LASTING: tuple[Kind, ...] = ("stop", "stick", "cut off", "cut in two", "cut from controller")
"""Kinds of which some never pass."""

POINTS = (
    "forward", "backward", "reduce", "exchange", "optimizer", "gather", "backup", "checkpoint", "held",
    "recovery", "move", "cross", "entry",
)  # fmt: skip

LEAST_NOTICE = 5.0
"""Seconds: a shorter notice may run out before the next step boundary."""

LEAST_STEPS = 6
"""Steps after which a worker that was told to go must have gone."""

FOREVER = 1000.0
"""Seconds: a stopped process or a cut link that stays so for longer than any run may last."""

QUIET_SECONDS = 60.0
"""Within which a run must end after the last fault: the time to find hangs and partitions included."""


@dataclass(frozen=True)
class Fault:
    """``kind`` at ``moment`` seconds, or when the ``count``-th worker reaches ``point``.

    ``pick`` (0 to 1) chooses among the workers that live then; at a point, ``here`` takes the one that has
    reached it. ``seconds`` is a duration, ``amount`` (0 to 1) whatever else the kind needs.
    """

    kind: Kind
    moment: float | None
    point: str
    count: int
    here: bool
    pick: float
    seconds: float
    amount: float

    def __str__(self) -> str:
        when = f"at {self.moment:.3f} s" if self.moment is not None else f"at {self.point} {self.count}"
        return f"{self.kind} {when} ({self.seconds:.2f} s)"


@dataclass(frozen=True)
class Schedule:
    """What the run of ``seed`` is like."""

    seed: int
    settings: Settings
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        s = self.settings
        chunks = f" x {s.chunks} chunks" if s.chunks > 1 else ""
        chunks += f" on paths {s.model.cut.paths}" if s.model.cut is not None else ""
        return (
            f"seed {self.seed}: {s.steps} steps on {len(s.domains)} workers ({', '.join(s.domains)}), "
            f"{s.stages} stages{chunks}, {s.model.micro_batches} micro-batches, {s.min_workers} to "
            f"{s.max_workers} workers + {s.spares}, checkpoint every {s.checkpoint_every}, "
            f"{'salvage' if s.salvage else 'no salvage'}{', split backward' if s.split_backward else ''}; "
            + ("; ".join(map(str, self.faults)) or "no faults")
        )


def draw(seed: int) -> Schedule:
    """The schedule of ``seed``."""
    random = Random(seed)
    workers = random.randint(2, 8)
    per_domain = random.choice((1, 1, 1, 2, 2, 3))
    stages: Stages = random.choice((1, 2, 2, 3, "auto"))
    layers = random.choice((4, 6))
    elastic = random.random() < 0.6
    settings = Settings(
        model=ToyModel(
            toy_layout(layers, random.choice((2, 5)), tied=random.random() < 0.4), random.choice((3, 5))
        ),
        steps=random.randint(8, 14),
        domains=tuple(f"node-{w // per_domain}" for w in range(workers)),
        stages=stages,
        min_workers=random.choice((1, 1, 2, max(1, workers // 2))),
        max_workers=workers + random.choice((0, 0, 1, 2)) if elastic else None,
        spares=random.choice((0, 0, 1)) if elastic else 0,
        checkpoint_every=random.choice((0, 0, 3, 4)),
    )
    flavour = random.choice(("losses", "planned", "hangs", "links", "controller", "everything", "everything"))
    faults: list[Fault] = []
    for _ in range(random.choice((1, 1, 2, 2, 3, 4))):
        faults.append(_fault(random, flavour, faults[-1].moment if faults else None))
    settings = replace(
        settings,
        salvage=random.random() < 0.7,
        split_backward=random.random() < 0.3,
        chunks=random.choice((1, 1, 2)),
    )
    if settings.chunks == 1 and random.random() < 0.3:
        cut = _cut(random, layers, settings.model.micro_batches)
        settings = replace(settings, model=replace(settings.model, cut=cut))
    if random.random() < 0.3:
        faults.append(replace(_fault(random, flavour, faults[-1].moment), kind="resize"))
    return Schedule(seed, settings, tuple(faults))


def _cut(random: Random, layers: int, micro_batches: int) -> Cut:
    """Any stages, and any paths over them from the first to the last."""
    stages = random.randint(3, layers)
    bounds = (0, *sorted(random.sample(range(1, layers), stages - 1)), layers)
    middle = range(1, stages - 1)
    paths = (random.sample(middle, random.randint(0, stages - 2)) for _ in range(micro_batches))
    return Cut(bounds, tuple((0, *path, stages - 1) for path in paths))


_FLAVOURS: dict[str, tuple[Kind, ...]] = {
    "losses": ("kill", "kill", "kill", "lose domain", "lose machines"),
    "planned": ("drain", "drain", "slow"),
    "hangs": ("stop", "stick", "stop", "kill"),
    "links": ("cut off", "cut in two", "cut from controller", "reset link", "kill"),
    "controller": ("kill controller", "kill controller", "kill", "drain", "stall controller", "stop"),
    "everything": (
        "kill", "kill", "lose domain", "lose machines", "stop", "stick", "slow", "drain", "drain", "cut off",
        "cut in two", "cut from controller", "reset link", "kill controller", "stall controller",
        "stop the run",
    ),
}  # fmt: skip


def _fault(random: Random, flavour: str, before: float | None) -> Fault:
    kind = random.choice(_FLAVOURS[flavour])
    at_point = random.random() < 0.5
    moment = random.uniform(0.3, 4.0)
    if before is not None and random.random() < 0.5:  # while the one before it is being dealt with
        moment = before + random.choice((random.uniform(0.0, 0.02), random.uniform(0.0, 0.3)))
    if kind == "kill controller":
        at_point = False
    seconds = random.choice((random.uniform(0.05, 0.8), random.uniform(0.8, 6.0), random.uniform(6.0, 20.0)))
    if kind in LASTING and random.random() < 0.2:
        seconds = FOREVER
    return Fault(
        kind=kind,
        moment=None if at_point else moment,
        point=random.choice(POINTS) if at_point else "",
        count=random.choice((random.randint(1, 6), random.randint(1, 60))),
        here=random.random() < 0.7,
        pick=random.random(),
        seconds=seconds,
        amount=random.random(),
    )


def run(schedule: Schedule, planner: Planner, journal: Journal | None = None) -> SimCluster:
    """Runs ``schedule`` to its end. Violation, with the seed and the schedule, where a check fails."""
    cluster = SimCluster(schedule.settings, planner, schedule.seed, journal)
    try:
        _arm(cluster, schedule.faults)
        last = max((fault.moment or 0.0 for fault in schedule.faults), default=0.0)
        last += max((fault.seconds for fault in schedule.faults if fault.seconds < FOREVER), default=0.0)
        cluster.run(last, last + QUIET_SECONDS)
        _check_end(cluster, schedule)
    except Exception as error:  # whatever it is, its seed must be known
        raise Violation(
            f"{type(error).__name__}: {error}\n  at {cluster.clock.now:.4f} s, {cluster.where()}\n"
            f"  {schedule}"
        ) from error
    return cluster


def _check_end(cluster: SimCluster, schedule: Schedule) -> None:
    end = cluster.host.end
    if end is None:
        check(cluster.stranded, "not at an end")
        return
    kinds = {fault.kind for fault in schedule.faults}
    settings = schedule.settings
    if end.outcome == "completed":
        check(cluster.record.recorded == settings.steps, "completed, but not all steps are on record")
    else:
        members = cluster.host.controller.members
        alone = settings.max_workers is None and len(members) < settings.min_workers
        check(alone or "stop the run" in kinds, f"ended: {end.message}")
    silent = {"cut off", "cut from controller", "kill controller", "stall controller"}
    check(kinds & silent or not cluster.checks.gaps, f"{cluster.checks.gaps} steps were never recorded")
    if kinds <= set(PLANNED):
        deaths = any(fault.kind == "drain" and fault.seconds < LEAST_NOTICE for fault in schedule.faults)
        check(deaths or cluster.interrupts == 0, "a planned change interrupted somebody")
        _check_drains(cluster)
        _check_size(cluster)


def _check_drains(cluster: SimCluster) -> None:
    """Who was told to go in good time has gone, where enough stayed, or came in good time."""
    events = [event for _, event in cluster.record.events]
    notices = {event.worker: event.step for event in events if isinstance(event, DrainNotice)}
    gone = {event.worker for event in events if isinstance(event, WorkerLeft | WorkerLost)}
    in_time = cluster.record.recorded - LEAST_STEPS
    joined = cluster.host.joined
    there = [w for w in cluster.host.controller.members if w not in notices and joined[w] <= in_time]
    for worker, step in notices.items():
        late = step > in_time or len(there) < cluster.settings.min_workers
        check(worker in gone or late, f"worker {worker} was told to go in step {step}")


def _check_size(cluster: SimCluster) -> None:
    """No more stay than were asked for in good time."""
    asked = [event for _, event in cluster.record.events if isinstance(event, Resized)]
    if asked and asked[-1].step <= cluster.record.recorded - LEAST_STEPS:
        most, members = asked[-1].workers + cluster.settings.spares, cluster.host.controller.members
        check(len(members) <= most, f"{len(members)} workers where {most} were asked for")


def _arm(cluster: SimCluster, faults: tuple[Fault, ...]) -> None:
    waiting: list[tuple[Fault, list[int]]] = []
    for fault in faults:
        if fault.moment is not None:
            cluster.clock.after(fault.moment, partial(_strike, cluster, fault, None))
        else:
            waiting.append((fault, [0]))

    def on_point(worker: WorkerId, point: str) -> bool:
        struck = False
        for item in [item for item in waiting if item[0].point == point]:
            fault, passed = item
            passed[0] += 1
            if passed[0] == fault.count:
                waiting.remove(item)
                _strike(cluster, fault, worker if fault.here else None)
                struck = True
        return struck

    if waiting:
        cluster.on_point = on_point


def _strike(cluster: SimCluster, fault: Fault, here: WorkerId | None) -> None:
    living = cluster.living
    if not living or cluster.host.end is not None:
        return
    victim = here if here is not None else living[int(fault.pick * len(living))]
    if cluster.journal:
        cluster.journal.fault(cluster.clock.now, f"{fault}: worker {victim} of {living}, {fault.amount:.2f}")
    others = [worker for worker in living if worker != victim]
    worker, host, process = cluster.workers[victim], cluster.host.identity, cluster.host.process
    both = fault.amount < 0.6
    rest = [worker for worker in living if (hash((worker, fault.pick)) & 1) == 0]
    actions: dict[Kind, Callable[[], None]] = {
        "kill": lambda: cluster.kill(victim),
        "lose domain": lambda: cluster.lose_domain(cluster.domains[victim], machine=False),
        "lose machines": lambda: cluster.lose_domain(cluster.domains[victim], machine=True),
        "stop": lambda: cluster.stop(victim, fault.seconds),
        "stick": lambda: setattr(worker, "stuck_for", fault.seconds),
        "slow": lambda: setattr(worker, "speed", 0.1 + 0.7 * fault.amount),
        "drain": lambda: cluster.drain(
            victim, fault.seconds if fault.amount < 0.5 else None, tells_itself=fault.pick < 0.5
        ),
        "resize": lambda: cluster.resize(_size(cluster.settings, fault.amount)),
        "cut off": lambda: cluster.cut([victim], [*others, host], fault.seconds, both_ways=both),
        "cut in two": lambda: cluster.cut(
            rest, [w for w in living if w not in rest], fault.seconds, both_ways=both
        ),
        "cut from controller": lambda: cluster.cut(
            [victim] if fault.amount < 0.8 else rest, [host], fault.seconds, both_ways=both
        ),
        "reset link": lambda: cluster.network.break_link(victim, (others or [host])[0]),
        "kill controller": lambda: cluster.kill_controller(min(fault.seconds, 8.0)),
        "stall controller": lambda: process.stop(min(fault.seconds, 4.0)),
        "stop the run": cluster.request_stop,
    }
    actions[fault.kind]()


def _size(settings: Settings, amount: float) -> int:
    """One of the numbers of workers that a person may ask for."""
    most = max(settings.max_workers or 0, len(settings.domains))
    return settings.min_workers + int(amount * (most - settings.min_workers + 1))
