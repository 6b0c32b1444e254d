"""What an interrupted step costs: workers killed late in a step, with and without what survivors kept of it.

``redo`` is what the interrupted step took, from commit to commit, beyond an undisturbed step and beyond
finding the loss, agreeing, planning and moving. It is compared with the lost worker's share of the step: the
seconds that it computed in the whole step before, as its own ledger tells. All of that falls to others: what
it had computed is done again, and what was left is taken over, whenever in the step it is killed. Stages have
two workers, which is the hardest case: there is one to do it all. That it takes the lost worker's share and
no more means that nothing else is done again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from rich.console import Console

from jobs.bench.resident import wait_for
from jobs.bench.traced import computed, entries
from jobs.bench.watched import Watched, intervals, kill, recipe, row, watched
from runtime.events import Recovered, StepRecord, WorkerLost
from runtime.plan import Plan, WorkerId
from runtime.run_folder import LoggedEvent

GOAL, FEWEST_KILLS = 1.10, 5
KILLS = 5
PART_OF_STEP = 0.95
"""Of its passes through layers that the killed worker has begun: nearly all of its share has to be redone."""

WORKERS, LAYERS, FORWARD_SECONDS = 4, 8, 0.015
STEPS = 3


@dataclass(frozen=True, slots=True)
class Kill:
    """One interrupted step; all in seconds. ``lost_share``: what the lost worker computes in a step;
    ``computed``: what it had computed of this one. ``kept`` is the share of the step that was not done again.
    """

    redo: float
    lost_share: float
    computed: float
    recovery: float
    step_seconds: float
    kept: float

    @property
    def ratio(self) -> float:
        return self.redo / self.lost_share


def interrupted(
    steps: Sequence[StepRecord],
    events: Sequence[LoggedEvent],
    killed_at: float,
    ledger: list[tuple[float, float]],
) -> Kill | None:
    """What the kill at ``killed_at`` cost, of the worker with that ``ledger``; None where no step was under
    way: survivors had all they needed to commit it, or it had not begun.

    Raises ValueError if the log has no recovery after it, or too few steps before it.
    """
    lost = next((e.time for e in events if isinstance(e.event, WorkerLost) and e.time > killed_at), None)
    found = next((e.event for e in events if isinstance(e.event, Recovered) and e.time > killed_at), None)
    if lost is None or not isinstance(found, Recovered):
        raise ValueError("the log has no recovery after the kill")
    by_step = {record.step: record for record in steps}
    before, redone = by_step[found.from_version], by_step[found.from_version + 1]
    if not before.committed_at < killed_at < redone.committed_at or before.generation == redone.generation:
        return None
    undisturbed = intervals([record for record in steps if record.step <= before.step], before.generation)
    earlier = by_step.get(before.step - 1)
    if not undisturbed or earlier is None:
        raise ValueError("the kill came before two steps were made under one plan")
    usual = median(undisturbed)
    # a kill from outside does not announce itself: detection counts from the signal, not from its first trace
    seconds = found.seconds
    recovery = lost - killed_at + seconds.agree + seconds.plan + seconds.move
    return Kill(
        redo=redone.committed_at - before.committed_at - usual - recovery,
        lost_share=computed(ledger, earlier.committed_at, before.committed_at),
        computed=computed(ledger, before.committed_at, killed_at),
        recovery=recovery,
        step_seconds=usual,
        kept=found.kept,
    )


def _run(folder: Path, *, salvage: bool) -> list[Kill]:
    name = f"salvage-{'on' if salvage else 'off'}"
    ledgers = folder / f"{name}-ledgers"
    ledgers.mkdir()
    base = recipe(name, WORKERS, LAYERS, FORWARD_SECONDS, ledger=str(ledgers))
    kills: list[tuple[float, list[tuple[float, float]]]] = []
    with watched(base.model_copy(update={"salvage": salvage}), folder / name) as run:
        for number in range(KILLS):
            plan = run.whole(STEPS, number)
            victim = plan.stages[number % 2].workers[-1]
            process = run.process(victim)
            _await_part_of_step(run, plan, victim, partial(entries, ledgers, process))
            killed_at = kill(process)
            kills.append((killed_at, entries(ledgers, process)))
        run.whole(1, KILLS)
        return _kills(run, kills, salvage)


def passes(plan: Plan, worker: WorkerId) -> int:
    """How often ``worker`` computes in a step: forward and backward, layer by layer."""
    stage = plan.stages[plan.stage_of(worker)]
    return 2 * (stage.stop - stage.first) * len(plan.micro_batches_of(worker))


def _await_part_of_step(
    run: Watched, plan: Plan, worker: WorkerId, ledger: Callable[[], list[tuple[float, float]]]
) -> None:
    """Until ``worker`` has begun ``PART_OF_STEP`` of its passes in some step of ``plan``."""
    whole = passes(plan, worker)
    committed_at = run.steps()[-1].committed_at

    def late() -> bool:
        begun = sum(began > committed_at for began, _ in ledger())
        return begun % whole >= PART_OF_STEP * whole

    wait_for(f"the end of a step of worker {worker}", late, poll_seconds=0.004)


def _kills(
    run: Watched, kills: Sequence[tuple[float, list[tuple[float, float]]]], salvage: bool
) -> list[Kill]:
    steps, events = run.steps(), run.events()
    found = [interrupted(steps, events, killed_at, ledger) for killed_at, ledger in kills]
    result = [each for each in found if each is not None]
    assert salvage or not any(each.kept for each in result), "nothing is kept where that is switched off"
    return result


@dataclass(frozen=True, slots=True)
class Redone:
    """The kills that met a step under way, with and without salvage."""

    salvaged: list[Kill]
    anew: list[Kill]

    @property
    def share(self) -> float:
        return median(each.ratio for each in self.salvaged)

    @property
    def share_anew(self) -> float:
        return median(each.ratio for each in self.anew)

    @property
    def enough(self) -> bool:
        return min(len(self.salvaged), len(self.anew)) >= FEWEST_KILLS


def measure(folder: Path, console: Console) -> Redone:
    """Both runs, one after the other. Raises RuntimeError if no kill met a step under way."""
    found = Redone(_run(folder, salvage=True), _run(folder, salvage=False))
    if not found.salvaged or not found.anew:
        raise RuntimeError("no kill met a step under way: the machine is too busy for its steps to be even")
    console.print(
        f"redo: {found.share:.2f} of the lost share, {found.share_anew:.2f} without salvage", highlight=False
    )
    return found


def rows(found: Redone) -> list[Mapping[str, str | float | int | None]]:
    """Of the table."""
    return [
        row(
            name,
            len(kills),
            pause_ms=1e3 * median(each.redo for each in kills),
            worst_ms=1e3 * max(each.redo for each in kills),
            of_ms=1e3 * median(each.lost_share for each in kills),
            share=median(each.ratio for each in kills),
        )
        for name, kills in (("redo, salvage", found.salvaged), ("redo, no salvage", found.anew))
    ]


def note(found: Redone) -> str:
    kept = [each.kept for each in found.salvaged]
    recovery = median(each.recovery for each in found.salvaged)
    done = median(each.computed for each in found.salvaged)
    alone = median(each.redo / each.computed for each in found.salvaged)
    return (
        f"redo: pause_ms is that of the interrupted step beyond an undisturbed one of "
        f"{1e3 * median(each.step_seconds for each in found.salvaged):.0f} ms and beyond "
        f"{1e3 * recovery:.0f} ms of detecting, agreeing, planning and moving; of_ms is what the lost one "
        f"computes in a step (it had computed {1e3 * done:.0f} ms of this one, over which alone the redo is "
        f"{alone:.2f}); {median(kept):.0%} of the step was kept (the least: {min(kept):.0%}); one of the two "
        f"workers of a stage was killed when it had begun {PART_OF_STEP:.0%} of its part of the step"
    )
