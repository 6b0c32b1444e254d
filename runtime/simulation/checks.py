"""What must hold in every simulated run, whatever happens. ``Violation`` where something does not.

The checks use what the simulation knows of all processes at once, and none of the controller's own
conclusions:

- A plan names every layer, shard and micro-batch exactly once, and puts backups into other failure domains.
- Nobody finishes the exchange of step t + 1 before version t is held twice; so the loss of one failure
  domain costs at most one step. Two domains that are lost before the next exchange may cost more, but never
  more than the newest version that is complete among those who are left, or the newest checkpoint.
- No two plans are alive: once an exchange of a plan is complete, nobody who takes part in it commits under an
  older one. A worker that was stopped and wakes up may complete the one exchange that it was missed in, and
  commit that step for itself; a second one is a violation.
- Steps are recorded once each, in order, with the reference's loss and fingerprint, and are taken back only
  where more than one failure domain was lost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from runtime.events import StepRecord
from runtime.layout import ALIGNMENT, Layout
from runtime.plan import Plan, WorkerId
from runtime.protocol import Change, Resume
from runtime.simulation.toy import Reference, ToyStore
from runtime.snapshots import Piece


class Violation(AssertionError):
    """The run did what no run may do."""


def check(condition: object, message: str) -> None:
    if not condition:
        raise Violation(message)


def check_plan(layout: Layout, plan: Plan, micro_batches: int, domains: Mapping[WorkerId, str]) -> None:
    """Every layer, shard and micro-batch once; every shard's backup in another domain where there is one."""
    check(plan.stages[0].first == 0 and plan.stages[-1].stop == layout.layers, "layers are missing")
    bounds = [stage.first for stage in plan.stages[1:]]
    check(bounds == [stage.stop for stage in plan.stages[:-1]], "stages do not follow each other")
    groups = {stage.workers for stage in plan.stages}
    check(sum(map(len, groups)) == len(plan.workers), "stage groups overlap without being the same")
    for stage, row in zip(plan.stages, plan.assignment, strict=True):
        check(len(row) == micro_batches, f"{len(row)} instead of {micro_batches} micro-batches")
        check(set(row) <= set(stage.workers), "a micro-batch is computed outside its stage")
    for path in plan.paths:
        check(len(set(path)) == len(path), f"the path {path} passes a stage twice")
        check(
            path[0] == 0 and path[-1] == len(plan.stages) - 1, f"the path {path} has no beginning or no end"
        )
    reached = dict.fromkeys(range(len(layout.blocks)), 0)
    holders = [frozenset(plan.holders(block.layers)) for block in layout.blocks]
    members = frozenset(plan.workers)
    several = len({domains[worker] for worker in plan.workers}) > 1
    for shard in plan.shards:
        check(shard.start == reached[shard.block], f"{shard} overlaps or leaves a gap: not one owner each")
        reached[shard.block] = shard.stop
        check(
            shard.owner in holders[shard.block],
            f"{shard} is not held by its owner",
        )
        if len(plan.workers) > 1:
            check(shard.backup in members and shard.backup != shard.owner, f"{shard} has no backup")
        if several and shard.backup is not None:
            check(domains[shard.backup] != domains[shard.owner], f"{shard} is kept in one failure domain")
    for block in layout.blocks:
        check(reached[block.index] == block.size, f"block {block.index} is not owned to its end")


class Checks:
    """One for a run; told of everything that simulated workers and controllers do."""

    def __init__(
        self,
        reference: Reference,
        domains: Mapping[WorkerId, str],
        stores: Mapping[WorkerId, ToyStore],
        min_workers: int,
    ) -> None:
        self.reference, self.layout = reference, reference.model.layout
        self.newest = 0
        """The newest version that anybody has committed and that has not been given up since."""
        self.safe = 0
        """The newest version that was held twice, or is durable."""
        self.lost: set[WorkerId] = set()
        """Workers with state that were lost since ``safe`` was reached."""
        self.recorded = 0
        self.exchanges = self.resumes = self.changes = 0
        self.gaps = 0
        """Steps that were never recorded."""
        self.taken_back = 0
        """Recorded steps that were taken back."""
        self._domains, self._stores, self._min_workers = domains, stores, min_workers
        self._keepers: frozenset[WorkerId] = frozenset()
        self._gone: set[WorkerId] = set()
        self._released: set[WorkerId] = set()
        self.generation = 0
        self._plans: dict[int, Plan] = {}
        self._at_work: set[WorkerId] = set()
        self._live = Plan(0, (), (), ())
        self._outlived: set[int] = set()
        self._newest_shared: dict[WorkerId, int] = {}
        self._shared: dict[tuple[int, int, int], set[WorkerId]] = {}
        self._complete: set[tuple[int, int]] = set()
        self._commits: set[tuple[WorkerId, int, int]] = set()

    @property
    def is_promised(self) -> bool:
        """Whether no more was lost since ``safe`` than may be lost at the cost of one step: one worker, or
        one failure domain of several."""
        domains = {self._domains[worker] for worker in self._keepers}
        return len(self.lost) <= min(1, len(self._keepers) - 1) or (
            len({self._domains[worker] for worker in self.lost}) <= 1 < len(domains)
        )

    # --- workers ----------------------------------------------------------------------------

    def shared(self, worker: WorkerId, plan: Plan, step: int, attempt: int) -> None:
        """``worker`` sends its share of the exchange; the last one to do so makes the exchange complete."""
        key = (plan.generation, step, attempt)
        sharers = self._shared.setdefault(key, set())
        newest = self._newest_shared.get(worker, 0)
        check(plan.generation >= newest, f"worker {worker} goes back from {newest} to {plan.generation}")
        self._newest_shared[worker] = plan.generation
        check(worker not in sharers, f"worker {worker} takes part twice in the exchange {key}")
        sharers.add(worker)
        if sharers != set(plan.workers):
            return
        generation, version = plan.generation, step - 1
        self._complete.add((generation, step))
        if generation < self._live.generation:
            # one that woke up late may still complete the exchange that it was missed in
            check(
                generation not in self._outlived,
                f"generation {generation} lives on beside {self._live.generation}",
            )
            self._outlived.add(generation)
            return
        self.exchanges += 1
        self._live = plan
        for shard in plan.shards:
            piece = (shard.block, shard.start, shard.stop)
            for keeper in (shard.owner, shard.backup):
                held = keeper is None or self._stores[keeper].get(piece, version) is not None
                check(held, f"exchange of step {step}, but worker {keeper} lacks {piece} at {version}")
        self.safe, self._keepers = version, frozenset(plan.workers)
        self.lost = {member for member in plan.workers if member in self._gone}

    def batch(self, step: int, micro_batches: tuple[int, ...]) -> None:
        whole = tuple(range(self.reference.model.micro_batches))
        check(micro_batches == whole, f"step {step} is made of the micro-batches {micro_batches}")

    def committed(self, worker: WorkerId, plan: Plan, step: int) -> None:
        """``worker`` has written version ``step`` of what it owns (its store has checked the content)."""
        generation = plan.generation
        commit = (worker, generation, step)
        check(commit not in self._commits, f"worker {worker} commits step {step} twice in {generation}")
        self._commits.add(commit)
        check((generation, step) in self._complete, f"worker {worker} commits step {step} by itself")
        if generation == self._live.generation:
            self.newest = max(self.newest, step)
        else:
            alive = worker in self._live.workers
            check(
                not alive, f"worker {worker} commits in {generation} and belongs to {self._live.generation}"
            )

    def lose(self, worker: WorkerId) -> None:
        """``worker`` has died or was fenced out; what it holds does not count any more. One that was let go
        is no loss: whoever let it go has seen to its state."""
        if worker not in self._gone and worker not in self._released:
            self._gone.add(worker)
            if worker in self._stores and self._stores[worker].holdings():
                self.lost.add(worker)

    def released(self, worker: WorkerId) -> None:
        """A controller says that nobody needs ``worker`` any more: the others have all that it had."""
        self._released.add(worker)
        self._keepers -= {worker}

    # --- controllers ------------------------------------------------------------------------

    def knows(self, plan: Plan) -> bool:
        """Whether exactly this plan was checked before: one command goes to many."""
        return self._plans.get(plan.generation) is plan

    def restarted(self, known: int) -> None:
        """A new controller begins; ``known`` is the newest generation that any living worker has heard of."""
        self.generation = known
        self._plans = {generation: plan for generation, plan in self._plans.items() if generation <= known}

    def began_anew(self, version: int) -> None:
        """A new controller found nobody: new workers begin at ``version``, the newest checkpoint or 0."""
        self.safe = self.newest = version
        self.lost = set()
        self.generation, self._plans, self._live = 0, {}, Plan(0, (), (), ())
        self._shared, self._complete, self._outlived = {}, set(), set()

    def resumed(
        self,
        resume: Resume,
        members: Collection[WorkerId],
        living: Collection[WorkerId],
        durable: int | None,
        stopping: bool,
    ) -> None:
        """A controller has everybody go on from ``resume.version``; ``durable`` is the newest checkpoint
        that it was told of. Processes of the ``living`` have not ended, whatever it thinks of them."""
        self._planned(resume.plan, members, stopping)
        self.resumes += 1
        version = resume.version
        sources = {transfer.source for transfer in resume.transfers}
        check(sources <= set(members), f"state is to come from {sources - set(members)}, who are gone")
        complete = self._newest_complete(members)
        if resume.source == "peers":
            check(version == complete, f"goes on from {version} where {complete} is the newest complete one")
        else:
            check(complete is None, f"goes back to {resume.source} where {complete} is complete")
            silent = set(living) & self._at_work - set(members) - self._released
            kept = self._newest_complete({*members, *silent})
            check(kept is None, f"goes back to {resume.source} though {silent} live, and with them {kept}")
            check(version == (durable or 0), f"goes back to {version} where {durable} is durable")
        if self.is_promised:
            least = max(self.safe, self.newest - 1)
            check(
                version >= least,
                f"only {sorted(self.lost)} were lost, and with them the steps after {version} up to "
                f"{self.newest}; version {self.safe} was safe",
            )
        expected = None if version == 0 else (version,)
        check(resume.exponents == expected, f"exponents {resume.exponents} at version {version}")
        self._at_work = set(resume.plan.workers)
        if resume.source != "peers":
            self.safe, self.lost = version, set()
        self.newest = version

    def changed(self, change: Change, members: Collection[WorkerId], stopping: bool) -> None:
        """A controller orders a planned change."""
        self._planned(change.plan, members, stopping)
        self._at_work |= set(change.plan.workers)
        self.changes += 1

    def _planned(self, plan: Plan, members: Collection[WorkerId], stopping: bool) -> None:
        generation = plan.generation
        check(generation >= self.generation, f"plan {generation} after {self.generation}")
        check(generation not in self._plans, f"a second plan of generation {generation}")
        self.generation, self._plans[generation] = generation, plan
        check(
            set(plan.workers) <= set(members), f"plan with {set(plan.workers) - set(members)}, who are gone"
        )
        enough = len(members) >= self._min_workers or stopping
        check(enough, f"goes on with {len(members)} workers, fewer than {self._min_workers}")
        check_plan(self.layout, plan, self.reference.model.micro_batches, self._domains)

    def interrupted(self, generation: int) -> None:
        self.generation = generation

    def record(self, record: StepRecord, gap_is_known: bool = False) -> None:
        """A step is written down as committed. A gap is better than to stop recording, where nobody knows
        what belongs there (``gap_is_known`` says whether somebody does)."""
        step = record.step
        check(step > self.recorded, f"step {step} is recorded after step {self.recorded}")
        check(not gap_is_known, f"step {step} is recorded after {self.recorded}, and somebody knows the rest")
        self.gaps += step - self.recorded - 1
        check(record.loss == self.reference.loss(step), f"step {step} is recorded with a wrong loss")
        right = record.fingerprint == self.reference.fingerprint(step)
        check(right, f"step {step} is recorded with a wrong fingerprint")
        self.recorded = step

    def take_back(self, version: int) -> None:
        check(not self.is_promised, f"steps after {version} taken back for {sorted(self.lost)}")
        check(version < self.recorded, f"nothing to take back after {version}")
        self.taken_back += self.recorded - version
        self.recorded = version

    def _newest_complete(self, members: Collection[WorkerId]) -> int | None:
        """The newest version of which ``members`` hold every unit, counted one by one."""
        units = sum(block.size // ALIGNMENT for block in self.layout.blocks)
        held: dict[int, set[tuple[int, int]]] = {}
        for member in members:
            for holding in self._stores[member].holdings():
                piece: Piece = (holding.block, holding.start, holding.stop)
                held.setdefault(holding.version, set()).update(_units(piece))
        return max((version for version, found in held.items() if len(found) == units), default=None)


def _units(piece: Piece) -> list[tuple[int, int]]:
    block, start, stop = piece
    return [(block, unit) for unit in range(start // ALIGNMENT, stop // ALIGNMENT)]
