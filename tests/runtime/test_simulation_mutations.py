"""The simulation finds bugs: each deliberate one below is caught within a few schedules, and none without.

=========================  ==========================================  ===============================
bug                        what is done                                how it shows
=========================  ==========================================  ===============================
newest_at_all              goes on from the newest version of anybody  a transfer without a source
one_too_old                goes on from an older complete version      a newer one was complete
same_generation            a loss does not raise the generation        no end
one_not_interrupted        one survivor is not asked                   steps taken back, no end
released_too_early         a leaver goes while others need its state   no end
backups_as_sources         copies count as sources at a boundary       a piece to be sent is not there
reused_id                  an id is given twice                        a second worker of that id
broken_links_ignored       accusations mean nothing                    no end
silence_ignored            missing heartbeats mean nothing             no end
last_transfer_forgotten    one piece is not moved                      wrong contents of a shard
leavers_not_told           who loses its work does not hear of it      it does not go
newcomer_as_usher          a newcomer is to let others in              no end
recorded_twice             a step told twice is recorded twice         recorded after itself
unfinished_record_dropped  the record in the making is lost            no end: a record is missing
restarted_in_good_faith    a new controller takes it that all is well  a change with the dead
dead_asked                 the lost worker stays a member              an older version, no end
copies_not_awaited         an exchange before the copies have come     a version not held twice
change_outlives_a_loss     an overtaken change is still waited for     no end
hasty                      late heartbeats count as silence            a planned change interrupts
silently_taken_back        records that are void stay                  a step recorded twice
everybody_contributes      sums of those who do not go on are kept     wrong or missing sums
silent_state_given_up      silent workers' state is not waited for     they live, and hold it
=========================  ==========================================  ===============================
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any

import pytest

import runtime.control.boundary
import runtime.control.recovery
import runtime.controller
import runtime.learning
from jobs.schedules import eager_planner
from runtime.control.state import Phase
from runtime.controller import Controller
from runtime.detection import Disputes, Watch
from runtime.hiring import Hiring
from runtime.layout import Layout
from runtime.plan import Plan, WorkerId
from runtime.protocol import Change, Here, Interrupt, Resume
from runtime.resharding import Holding, Transfer, newest_complete_version, plan_transfers
from runtime.salvage import Salvage
from runtime.signals import Committed, Output, Send, TakenBack
from runtime.simulation.checks import Violation
from runtime.simulation.schedule import Kind, Schedule, draw, run
from runtime.simulation.step import SimStep

TRIED = 150
"""Most schedules that a bug may take to show."""

Patch = pytest.MonkeyPatch
Mutation = Callable[[Patch], None]
Holdings = Mapping[WorkerId, Sequence[Holding]]


def on_handle(patch: Patch, change: Callable[[Controller, Output], Output | None]) -> None:
    """Changes (or drops) what comes out of the controller."""
    handle = Controller.handle

    def mutated(self: Controller, event: Any, now: float) -> list[Output]:
        outputs = (change(self, output) for output in handle(self, event, now))
        return [output for output in outputs if output is not None]

    patch.setattr(Controller, "handle", mutated)


def newest_at_all(patch: Patch) -> None:
    """Goes on from the newest version that anybody holds, complete or not."""

    def newest(layout: Layout, holdings: Holdings) -> int | None:
        return max((h.version for held in holdings.values() for h in held), default=None)

    patch.setattr(runtime.control.recovery, "newest_complete_version", newest)


def one_too_old(patch: Patch) -> None:
    """Goes on from the oldest complete version: an off-by-one that loses a step for nothing."""

    def oldest(layout: Layout, holdings: Holdings) -> int | None:
        newest = newest_complete_version(layout, holdings)
        if newest is None:
            return None
        older = {w: [h for h in held if h.version < newest] for w, held in holdings.items()}
        before = newest_complete_version(layout, older)
        return newest if before is None else before

    patch.setattr(runtime.control.recovery, "newest_complete_version", oldest)


def same_generation(patch: Patch) -> None:
    """A loss does not begin a new generation."""
    interrupt = Controller._interrupt

    def mutated(self: Controller, now: float) -> list[Output]:
        self.generation -= 1
        return interrupt(self, now)

    patch.setattr(Controller, "_interrupt", mutated)


def one_not_interrupted(patch: Patch) -> None:
    """One survivor is neither interrupted nor asked."""

    def change(controller: Controller, output: Output) -> Output | None:
        match output:
            case Send(worker, Interrupt()) if (
                worker == max(controller.members) and len(controller.members) > 1
            ):
                controller._asked.discard(worker)
                return None
        return output

    on_handle(patch, change)


def released_too_early(patch: Patch) -> None:
    """A leaver may go before the others have got what it holds."""
    release = Controller._release

    def mutated(self: Controller, now: float) -> list[Output]:
        unsettled, change = self._unsettled, self._change
        self._unsettled, self._change = set(), None
        try:
            return release(self, now)
        finally:
            self._unsettled, self._change = unsettled, change

    moved = Controller._moved

    def after_first_move(self: Controller, report: Any, now: float) -> list[Output]:
        return moved(self, report, now) + self._release(now)

    patch.setattr(Controller, "_release", mutated)
    patch.setattr(Controller, "_moved", after_first_move)


def backups_as_sources(patch: Patch) -> None:
    """Copies count as sources at a step boundary, where they are one step behind."""

    def transfers(layout: Layout, old: Plan, new: Plan) -> tuple[Transfer, ...]:
        holdings: dict[WorkerId, list[Holding]] = {worker: [] for worker in old.workers}
        for shard in old.shards:
            for keeper in (shard.owner, shard.backup):
                if keeper is not None:
                    holdings[keeper].append(Holding(shard.block, shard.start, shard.stop, 0))
        working = {w: {b.index: 0 for b in layout.blocks if w in old.holders(b.layers)} for w in old.workers}
        return plan_transfers(layout, new, 0, holdings, working)

    patch.setattr(runtime.control.boundary, "boundary_transfers", transfers)


def reused_id(patch: Patch) -> None:
    """A newcomer gets the id of a worker that was there before."""
    orders = Hiring.orders

    def mutated(self: Hiring, ready: int, now: float) -> Any:
        self.next_worker = max(0, self.next_worker - 1)
        return orders(self, ready, now)

    patch.setattr(Hiring, "orders", mutated)


def broken_links_ignored(patch: Patch) -> None:
    """Nobody is given up when two workers cannot reach each other."""
    patch.setattr(Disputes, "due", lambda self, now, members, heard_since: [])


def silence_ignored(patch: Patch) -> None:
    """Heartbeats that stop mean nothing."""
    patch.setattr(Watch, "overdue", lambda self, now, step_seconds: [])


def last_transfer_forgotten(patch: Patch) -> None:
    """One piece of state that a recovery should move is not moved."""

    def change(controller: Controller, output: Output) -> Output | None:
        match output:
            case Send(worker, Resume(transfers=transfers) as resume):
                return Send(worker, replace(resume, transfers=transfers[:-1]))
        return output

    on_handle(patch, change)


def leavers_not_told(patch: Patch) -> None:
    """Those who lose their work in a change do not hear of it."""

    def change(controller: Controller, output: Output) -> Output | None:
        match output:
            case Send(worker, Change(plan=plan)) if worker not in plan.workers:
                return None
        return output

    on_handle(patch, change)


def newcomer_as_usher(patch: Patch) -> None:
    """Whoever is first in the new plan tells newcomers where they come in, though it may be one itself."""

    def change(controller: Controller, output: Output) -> Output | None:
        match output:
            case Send(worker, Change(plan=plan) as order):
                return Send(worker, replace(order, usher=plan.workers[-1]))
        return output

    on_handle(patch, change)


def recorded_twice(patch: Patch) -> None:
    """A step that a new reporter tells again is recorded again."""

    def mutated(self: Controller, record: Any) -> list[Output]:
        self.next_record = record.step + 1
        return [Committed(record)]

    patch.setattr(Controller, "_stepped", mutated)


def unfinished_record_dropped(patch: Patch) -> None:
    """The record of the step that work goes on from is not handed on."""

    def change(controller: Controller, output: Output) -> Output | None:
        match output:
            case Send(worker, Resume() as resume):
                return Send(worker, replace(resume, record=None))
        return output

    on_handle(patch, change)


def restarted_in_good_faith(patch: Patch) -> None:
    """A new controller takes it that all is well, whatever the workers tell."""
    standing = runtime.learning.standing

    def mutated(answers: Mapping[WorkerId, Here]) -> Any:
        return replace(standing(answers), undisturbed=True, missing=())

    patch.setattr(runtime.controller, "standing", mutated)


def dead_asked(patch: Patch) -> None:
    """The lost worker stays a member."""
    lost = Controller._lost

    def mutated(self: Controller, worker: WorkerId, *rest: Any, **more: Any) -> list[Output]:
        member = self.members.get(worker)
        outputs = lost(self, worker, *rest, **more)
        if member is not None and self.phase is Phase.AGREEING:
            self.members[worker] = member
        return outputs

    patch.setattr(Controller, "_lost", mutated)


def copies_not_awaited(patch: Patch) -> None:
    """Workers take part in an exchange before the copies that they keep have come."""

    def mutated(self: SimStep, version: int, *, wait: bool) -> Any:
        return take(self, version, wait=False)

    take = SimStep._take_backups
    patch.setattr(SimStep, "_take_backups", mutated)


def change_outlives_a_loss(patch: Patch) -> None:
    """A planned change that a loss has overtaken is still waited for."""
    interrupt = Controller._interrupt

    def mutated(self: Controller, now: float) -> list[Output]:
        change = self._change
        outputs = interrupt(self, now)
        self._change = change
        return outputs

    patch.setattr(Controller, "_interrupt", mutated)


def hasty(patch: Patch) -> None:
    """Two late heartbeats, and a worker is given up."""
    patch.setattr(Watch, "patience", lambda self: 0.12)


def silently_taken_back(patch: Patch) -> None:
    """Nobody is told that recorded steps will be done again."""
    on_handle(patch, lambda controller, output: None if isinstance(output, TakenBack) else output)


def silent_state_given_up(patch: Patch) -> None:
    """Goes back to a checkpoint although a silent worker may still hold what is missing."""
    decide = Controller._decide

    def mutated(self: Controller, now: float) -> list[Output]:
        self._out_of_reach.clear()
        return decide(self, now)

    patch.setattr(Controller, "_decide", mutated)


def everybody_contributes(patch: Patch) -> None:
    """Sums go on from whatever is in them, whosever micro-batches these are."""

    def change(controller: Controller, output: Output) -> Output | None:
        match output:
            case Send(worker, Resume(plan, salvage=Salvage() as found) as resume):
                every = replace(found, contributors=frozenset(plan.workers))
                return Send(worker, replace(resume, salvage=every))
        return output

    on_handle(patch, change)


def nobody_too_many(patch: Patch) -> None:
    """Whoever is no longer wanted stays."""
    patch.setattr(Controller, "_trim", lambda self, now: [])


MUTATIONS: Mapping[Mutation, Collection[Kind]] = {
    newest_at_all: (),
    one_too_old: (),
    same_generation: (),
    one_not_interrupted: (),
    released_too_early: ("drain",),
    backups_as_sources: (),
    reused_id: (),
    broken_links_ignored: ("reset link", "cut in two"),
    silence_ignored: ("stop",),
    last_transfer_forgotten: (),
    leavers_not_told: ("drain",),
    newcomer_as_usher: (),
    recorded_twice: (),
    unfinished_record_dropped: (),
    restarted_in_good_faith: ("kill controller",),
    dead_asked: (),
    copies_not_awaited: (),
    change_outlives_a_loss: ("kill", "lose domain", "lose machines"),
    hasty: ("slow", "drain"),
    silently_taken_back: ("lose domain", "lose machines", "kill"),
    everybody_contributes: (),
    nobody_too_many: ("resize",),
    silent_state_given_up: ("cut in two", "stop", "cut off"),
}
"""And kinds of faults of which a schedule must have one to be tried: () for any."""


def schedules(kinds: Collection[Kind]) -> Iterator[Schedule]:
    """The first ``TRIED`` that have to do with ``kinds``."""
    drawn = (draw(seed) for seed in count())
    return islice((s for s in drawn if not kinds or {fault.kind for fault in s.faults} & set(kinds)), TRIED)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_bug_is_found(mutate: Mutation, monkeypatch: Patch) -> None:
    mutate(monkeypatch)
    for schedule in schedules(MUTATIONS[mutate]):
        try:
            run(schedule, eager_planner)
        except Violation as violation:
            assert f"seed {schedule.seed}" in str(violation)
            return
    pytest.fail(f"{TRIED} schedules went well with this bug: {mutate.__doc__}")
