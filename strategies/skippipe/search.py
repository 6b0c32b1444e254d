"""Which stages each micro-batch of a step passes, and in which order, where it does not pass them all.

After SkipPipe (Blagoev, Chen and Ersoy, "SkipPipe: Partial and Reordered Pipelining Framework for Training
LLMs in Heterogeneous Networks", 2025, sec. 4): A* finds a micro-batch's quickest path by itself, and
conflict-based search (Sharon et al., "Conflict-based search for optimal multi-agent pathfinding", AIJ 2015)
resolves what paths of several do to each other. The search knows nothing of the workers: every stage is one
node that needs a nominal time for a micro-batch, so the paths are part of what is computed, not of who does
it.

Times are whole numbers, so ties are ties. Stage 0 passes every micro-batch, so it is as much quicker than the
others that all have equally much to do in a step (``strategies.skippipe.paths`` cuts the layers that way).
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import combinations

Path = tuple[int, ...]
"""Stages in the order in which a micro-batch passes them; begins with 0."""

Interval = tuple[int, int]
"""From a moment to the one before which it ends."""

FARTHEST = 1
"""A stage may be passed late by so many stages: after stage 3, stage 2 still may be, stage 1 may not."""

MEMORY = 3
"""Micro-batches whose activations a node keeps at once; stage 0, where all begin, is not limited."""

FORWARD, BACKWARD, LINK = 8, 12, 1
"""Nominal times, times (stages - 1) for a usual stage: a backward takes 1.5 forwards."""

TRIES = 30_000
"""Partial paths that all A* searches together look at, some tenths of a second, in equal parts for every
window of micro-batches. Conflicts of time that are left then cost waiting and no more."""


def search_terms() -> dict[str, int]:
    """What the paths follow from beside the recipe: with other terms the same recipe computes other bits."""
    return {
        "farthest": FARTHEST,
        "memory": MEMORY,
        "forward": FORWARD,
        "backward": BACKWARD,
        "link": LINK,
        "tries": TRIES,
    }


@dataclass(frozen=True, slots=True)
class Terms:
    """``taken`` of ``stages`` on every path; at most ``swaps`` of them late."""

    stages: int
    taken: int
    swaps: int

    def forward(self, stage: int) -> int:
        return FORWARD * (self.stages - 1 if stage else self.taken - 1)

    def backward(self, stage: int) -> int:
        return BACKWARD * (self.stages - 1 if stage else self.taken - 1)

    @property
    def link(self) -> int:
        return LINK * (self.stages - 1)


def swaps_of(path: Path) -> int:
    """How many stages of ``path`` are passed after a later one."""
    return sum(stage < max(path[: place + 1]) for place, stage in enumerate(path))


def search_paths(stages: int, taken: int, micro_batches: int, swaps: int = 2) -> tuple[Path, ...]:
    """A path for each of a step's micro-batches: ``taken`` of ``stages``, stage 0 first, no stage twice, at
    most ``swaps`` of them late and none by more than ``FARTHEST``.

    The other stages are passed equally often, up to one. Pure; takes a second at most.

    Raises ValueError for numbers that leave a stage without a micro-batch, or make no path.
    """
    _check(stages, taken, micro_batches, swaps)
    if (taken == stages and not swaps) or stages == 1:
        return (tuple(range(stages)),) * micro_batches
    terms = Terms(stages, taken, swaps)
    window = stages - 1  # in so many micro-batches every stage has its turn equally often
    windows = -(-micro_batches // window)
    busy: dict[int, list[Interval]] = {stage: [] for stage in range(stages)}
    held: dict[int, list[Interval]] = {stage: [] for stage in range(stages)}
    passed: Counter[int] = Counter()
    found: list[Path] = []
    for first in range(0, micro_batches, window):
        agents = range(first, min(first + window, micro_batches))
        often, more = divmod(agents.stop * (taken - 1), window)
        room = {stage: often + (stage <= more) - passed[stage] for stage in range(1, stages)}
        trips = _Window(terms, agents, busy, held, room, TRIES // windows).resolve()
        for trip in trips:
            found.append(trip.path)
            passed.update(trip.path)
            for stage, forth, back in trip.visits():
                insort(busy[stage], forth)
                insort(busy[stage], back)
                held[stage].append((forth[0], back[1]))
        # what has ended before anybody of the next window can come is no matter to it
        now = _release(terms, agents.stop)
        for stage in range(stages):
            busy[stage] = [each for each in busy[stage] if each[1] > now]
            held[stage] = [each for each in held[stage] if each[1] > now]
    return tuple(found)


def _check(stages: int, taken: int, micro_batches: int, swaps: int) -> None:
    if min(stages, taken, micro_batches) < 1 or swaps < 0:
        raise ValueError("stages, stages taken and micro-batches must be at least 1, and swaps at least 0")
    if taken > stages:
        raise ValueError(f"a path of {taken} stages is more than there are ({stages}): take fewer")
    if stages > 1 and micro_batches * (taken - 1) < stages - 1:
        raise ValueError(
            f"{micro_batches} paths of {taken} stages do not reach all of the {stages}: take more "
            "of them, or more micro-batches a step"
        )


def _release(terms: Terms, micro_batch: int) -> int:
    """When it may begin: as often as stage 0 can do a forward and a backward."""
    return micro_batch * (terms.forward(0) + terms.backward(0))


@dataclass(frozen=True, slots=True)
class _Trip:
    """One micro-batch's way there and back; ``forth`` and ``back`` as ``path``."""

    path: Path
    forth: tuple[Interval, ...]
    back: tuple[Interval, ...]

    @property
    def end(self) -> int:
        return self.back[0][1]

    def visits(self) -> Iterator[tuple[int, Interval, Interval]]:
        return zip(self.path, self.forth, self.back, strict=True)


@dataclass(frozen=True)
class _Ban:
    """What one micro-batch may not do: pass ``stages`` at all, or be at a stage at certain times."""

    stages: frozenset[int] = frozenset()
    times: Mapping[int, tuple[Interval, ...]] = field(default_factory=dict)


def _earliest(time: int, length: int, taken: Sequence[Interval]) -> int:
    """The first moment from ``time`` on with ``length`` free; ``taken`` is sorted by beginnings."""
    for begin, end in taken:
        if end > time and begin < time + length:
            time = end
    return time


class _Window:
    """The micro-batches ``agents``, among what earlier ones have settled for. ``room``: how many of them are
    to pass each stage; ``tries``: after how many no further conflict is resolved."""

    def __init__(
        self,
        terms: Terms,
        agents: range,
        busy: Mapping[int, Sequence[Interval]],
        held: Mapping[int, Sequence[Interval]],
        room: Mapping[int, int],
        tries: int,
    ) -> None:
        self._terms, self._agents, self._room = terms, agents, room
        self._busy, self._held = busy, held
        self._tries = tries

    def resolve(self) -> list[_Trip]:
        """Conflict-based search: the earliest end of all of them without a conflict, or the best that was
        seen before the tries are used up. Which stages are passed how often is settled first, as in the
        paper."""
        trips: list[_Trip] = []
        for agent in self._agents:
            usage = Counter(stage for trip in trips for stage in trip.path)
            trips.append(self._quickest(agent, _Ban(), usage) or self._turn(agent))
        order = 0
        heap = [(*self._rank(trips), order, trips, {agent: _Ban() for agent in self._agents})]
        best = heap[0]
        while heap and self._tries > 0:
            top = heappop(heap)
            if top[:3] < best[:3]:
                best = top
            trips, bans = top[-2:]
            children = list(self._children(trips, bans))
            if not children:
                return trips
            for agent, ban in children:
                usage = Counter(
                    stage
                    for other, trip in zip(self._agents, trips, strict=True)
                    for stage in trip.path
                    if other != agent
                )
                trip = self._quickest(agent, ban, usage)
                if trip is None:
                    continue
                changed = [
                    trip if other == agent else before
                    for other, before in zip(self._agents, trips, strict=True)
                ]
                order += 1
                heappush(heap, (*self._rank(changed), order, changed, {**bans, agent: ban}))
        if best[0]:
            return [self._turn(agent) for agent in self._agents]
        return best[-2]

    def _rank(self, trips: Sequence[_Trip]) -> tuple[int, int, int]:
        usage = Counter(stage for trip in trips for stage in trip.path)
        over = sum(max(usage[stage] - room, 0) for stage, room in self._room.items())
        conflicts = sum(1 for _ in self._clashes(trips)) + sum(1 for _ in self._crowds(trips))
        return over, max(trip.end for trip in trips), conflicts

    def _turn(self, agent: int) -> _Trip:
        """The path that is this micro-batch's turn if all stages take turns."""
        terms = self._terms
        others = terms.stages - 1
        mine = sorted(1 + (agent * (terms.taken - 1) + each) % others for each in range(terms.taken - 1))
        skipped = frozenset(range(1, terms.stages)) - set(mine)
        trip = self._quickest(agent, _Ban(skipped), Counter())
        assert trip is not None, "the path in order is always possible"
        return trip

    # --- conflicts -----------------------------------------------------------------------------------------

    def _children(self, trips: Sequence[_Trip], bans: Mapping[int, _Ban]) -> Iterator[tuple[int, _Ban]]:
        """Two ways out of the first conflict, of capacity, then of memory, then of times."""
        usage = Counter(stage for trip in trips for stage in trip.path)
        for stage, room in self._room.items():
            if usage[stage] > room:
                crowd = [a for a, trip in zip(self._agents, trips, strict=True) if stage in trip.path]
                # whoever may choose most gives way first
                crowd.sort(key=lambda agent: (len(bans[agent].stages), -agent))
                for agent in crowd[:2]:
                    yield agent, replace(bans[agent], stages=bans[agent].stages | {stage})
                return
        found = next(self._crowds(trips), None) or next(self._clashes(trips), None)
        for agent, stage, interval in found or ():
            times = {**bans[agent].times}
            times[stage] = (*times.get(stage, ()), interval)
            yield agent, replace(bans[agent], times=times)

    def _crowds(self, trips: Sequence[_Trip]) -> Iterator[list[tuple[int, int, Interval]]]:
        """Where a node would keep too many: one or two who may come later, when somebody has left."""
        for stage in range(1, self._terms.stages):
            mine = [
                (forth[0], back[1], agent)
                for agent, trip in zip(self._agents, trips, strict=True)
                for at, forth, back in trip.visits()
                if at == stage
            ]
            for begin, _, agent in mine:
                there = [(end, other) for b, end, other in mine if b <= begin < end and other != agent]
                earlier = [end for b, end in self._held[stage] if b <= begin < end]
                if len(there) + len(earlier) < MEMORY:
                    continue
                leaves = min([*(end for end, _ in there), *earlier])
                late = [(agent, stage, (begin, leaves))]
                if there:
                    other = max(there)[1]
                    came = next(b for b, _, a in mine if a == other)
                    late.append((other, stage, (came, leaves)))
                yield late

    def _clashes(self, trips: Sequence[_Trip]) -> Iterator[list[tuple[int, int, Interval]]]:
        """Where two would be at one node at the same time: either may wait."""
        at: dict[int, list[tuple[Interval, int]]] = {}
        for agent, trip in zip(self._agents, trips, strict=True):
            for stage, forth, back in trip.visits():
                at.setdefault(stage, []).extend([(forth, agent), (back, agent)])
        for stage, visits in sorted(at.items()):
            for (one, first), (other, second) in combinations(sorted(visits), 2):
                if first != second and one[0] < other[1] and other[0] < one[1]:
                    yield [(second, stage, one), (first, stage, other)]

    # --- one micro-batch -----------------------------------------------------------------------------------

    def _quickest(self, agent: int, ban: _Ban, usage: Mapping[int, int]) -> _Trip | None:
        """A* over links, forwards and backwards: the path that ends first; of equals the one with the fewest
        swaps, then through the stages that ``usage`` names least. None where there is none."""
        terms = self._terms
        taken = {
            stage: sorted([*self._busy[stage], *ban.times.get(stage, ())]) for stage in range(terms.stages)
        }
        begin = _earliest(_release(terms, agent), terms.forward(0), taken[0])
        start = (begin, begin + terms.forward(0))
        # (least end, swaps, usage, stages to go, path, forwards, trip)
        heap: list[tuple[int, int, int, int, Path, tuple[Interval, ...], _Trip | None]] = []
        heappush(heap, (self._least_end(start[1], (0,)), 0, 0, terms.taken - 1, (0,), (start,), None))
        seen: dict[tuple[int, frozenset[int]], int] = {}
        while heap:
            _, swaps, used, left, path, forth, trip = heappop(heap)
            self._tries -= 1
            if trip is not None:
                return trip
            if not left:
                trip = self._home(path, forth, taken)
                heappush(heap, (trip.end, swaps, used, 0, path, forth, trip))
                continue
            key = path[-1], frozenset(path)
            if seen.get(key, forth[-1][1] + 1) <= forth[-1][1]:
                continue
            seen[key] = forth[-1][1]
            for stage in self._next(path, swaps, left, ban.stages):
                begin = _earliest(forth[-1][1] + terms.link, terms.forward(stage), taken[stage])
                end = begin + terms.forward(stage)
                longer = (*path, stage)
                heappush(
                    heap,
                    (
                        self._least_end(end, longer),
                        swaps + (stage < max(path)),
                        used + usage.get(stage, 0),
                        left - 1,
                        longer,
                        (*forth, (begin, end)),
                        None,
                    ),
                )
        return None

    def _next(self, path: Path, swaps: int, left: int, banned: frozenset[int]) -> Iterator[int]:
        front = max(path)
        for stage in range(max(1, front - FARTHEST), self._terms.stages):
            if stage in path or stage in banned:
                continue
            late = swaps + (stage < front)
            ahead = self._terms.stages - 1 - max(front, stage)
            if late <= self._terms.swaps and left - 1 <= ahead + self._terms.swaps - late:
                yield stage

    def _least_end(self, time: int, path: Path) -> int:
        """If nothing else is in the way from the end of the last forward of ``path`` on."""
        terms = self._terms
        left = terms.taken - len(path)
        usual = terms.forward(1) + terms.backward(1) + 2 * terms.link
        return time + left * usual + sum(map(terms.backward, path)) + (len(path) - 1) * terms.link

    def _home(
        self, path: Path, forth: tuple[Interval, ...], taken: Mapping[int, Sequence[Interval]]
    ) -> _Trip:
        terms, time, back = self._terms, forth[-1][1], []
        for place in reversed(range(len(path))):
            stage = path[place]
            begin = _earliest(time, terms.backward(stage), taken[stage])
            back.append((begin, begin + terms.backward(stage)))
            time = back[-1][1] + terms.link
        return _Trip(path, forth, tuple(reversed(back)))
