"""The feed beside Ray Train's: samples a second and the share of a step spent waiting for data.

Both train the same model on the same Parquet files on the same cores: one process that trains and one that
reads, decodes and augments; where ours has to wait it prepares some itself. Ours has the exact order (a
shuffle of the whole set, packed, every sample once an epoch) and writes its ledger; Ray Train's
``iter_torch_batches`` reads the files as they come.

In one regime the model costs next to nothing, so that samples a second are those of the feed. In the other,
training takes ten times what preparing takes: there the share of waiting counts, and the ratio is mostly that
of the steps. Our headline is the worse of the two, with float32 sums as the peer's are: the feeds are
compared, not the sums. Exact sums are measured beside them, where training is the bottleneck.

All are resident together and take short turns, in an order that is reversed from round to round; whoever is
not at turn is stopped by a signal, and the peer's worker waits for its turn with no iterator open. A turn is
compared with the peer's of the same round and regime.

Both compute the same layers in float32 with one thread, as many samples in a call and as many calls in a
step, keep all activations, divide by the tokens, clip and update by AdamW; neither wants gradients of the
images. What is not alike: our allocator keeps what is freed, our AdamW is torch's fused one with the recipe's
decay and warm-up, and the peer adds in place in ``.grad``, reports no loss and keeps no state that would
survive a fault.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import median

from rich.console import Console

from actors.cluster import RayRun, connect
from jobs.bench.feed_peer import RayTrainFeed
from jobs.bench.feed_set import (
    BATCH,
    MICRO_BATCHES,
    PREPARING,
    TRAINING,
    Regime,
    Window,
    recipe,
    write_set,
)
from jobs.bench.report import BenchReport, Row
from jobs.bench.resident import Commits, Turns, resting, wait_for

GOAL_RATIO, GOAL_WAIT = 1.0, 0.02
ROUNDS = 16
KEPT_PROCESSES = 16
"""Of Ray Data's, from one turn to the next: else they would start anew in each, and others' turns suffer."""
WARM_UP_STEPS = 8
EXACT, FAST = "reknit, exact order and sums", "reknit, exact order, float32 sums"
PEER = "Ray Train iter_torch_batches"
OURS = {PREPARING: {FAST: "fast"}, TRAINING: {FAST: "fast", EXACT: "exact"}}

Key = tuple[Regime, str]
"""A contender in a regime."""


class WaitingCommits(Commits):
    """As ``Commits``; ``waits`` has (commits, seconds of waiting for data so far) as they were looked at."""

    def __init__(self, run: RayRun) -> None:
        super().__init__(run)
        self.waits: list[tuple[int, float]] = []

    def __call__(self) -> list[float]:
        known = len(self._times)
        times = super().__call__()
        if len(times) > known:
            self.waits.append((len(times), self._run.badput()["data_wait"]))
        return times


class ReknitFeed:
    """A run of ours that is stopped by a signal when it is not its turn."""

    def __init__(self, name: str, run: RayRun, control: Turns) -> None:
        self._name, self._control = name, control
        self._commits = WaitingCommits(run)

    def take(self, regime: Regime) -> Window:
        """Lets it train for a turn. Raises RuntimeError if it ended by itself."""
        turn = self._control.take(self._name, self._commits, regime.warm_up + regime.steps)
        return window(turn.seconds[regime.warm_up :], self._commits(), self._commits.waits)


def window(seconds: Sequence[float], commits: Sequence[float], waits: Sequence[tuple[int, float]]) -> Window:
    """Of the last steps of a run, which took ``seconds``, among all its ``commits``. The share of waiting is
    that between the first and the last look of ``waits`` at these steps."""
    first = len(commits) - len(seconds)
    looks = [look for look in waits if first <= look[0] <= len(commits)]
    assert len(looks) > 1, "a turn is looked at while it lasts"
    (begin, waited_before), (end, waited) = looks[0], looks[-1]
    share = (waited - waited_before) / (commits[end - 1] - commits[begin - 1])
    return Window(len(seconds) * MICRO_BATCHES * BATCH / sum(seconds), share)


def rounds_of(
    takers: Mapping[Key, Callable[[], Window]], rounds: int, console: Console
) -> dict[Key, list[Window]]:
    """A turn of everybody in each round, in an order that is reversed from round to round."""
    windows: dict[Key, list[Window]] = {key: [] for key in takers}
    for number in range(rounds):
        for key in list(takers)[:: 1 if number % 2 == 0 else -1]:
            windows[key].append(takers[key]())
        for regime in dict.fromkeys(regime for regime, _ in takers):
            last = {who: windows[regime, who][-1] for which, who in takers if which is regime}
            rates = ", ".join(
                f"{who} {each.samples_per_second:.0f}/s"
                + (f" ({each.samples_per_second / last[PEER].samples_per_second:.3f})" if who != PEER else "")
                for who, each in last.items()
            )
            console.print(f"round {number + 1} of {rounds}, {regime.name}: {rates}", highlight=False)
    return windows


def ratio(ours: Sequence[Window], peers: Sequence[Window]) -> float:
    """Median over the rounds of our samples a second over the peer's of the same round."""
    return median(
        own.samples_per_second / peer.samples_per_second for own, peer in zip(ours, peers, strict=True)
    )


def report(windows: Mapping[Key, Sequence[Window]]) -> BenchReport:
    """What the turns say: the worse regime's ratio, and the longer wait where training is the bottleneck."""
    ratios = {(regime, who): ratio(each, windows[regime, PEER]) for (regime, who), each in windows.items()}
    waits = {key: median(turn.data_wait_share for turn in turns) for key, turns in windows.items()}
    of_peer = min(ratios[regime, FAST] for regime in OURS)
    wait = max(waits[TRAINING, who] for who in OURS[TRAINING])
    rows: list[Row] = [
        {
            "what": who,
            "regime": regime.name,
            "samples_per_second": median(turn.samples_per_second for turn in turns),
            "of_ray_train": ratios[regime, who],
            "data_wait_share": waits[regime, who],
        }
        for (regime, who), turns in windows.items()
    ]
    return BenchReport(
        bench="feed",
        headline={
            "ratio_to_ray_train": of_peer,
            "ratio_preparing": ratios[PREPARING, FAST],
            "ratio_training": ratios[TRAINING, FAST],
            "ratio_with_exact_sums": ratios[TRAINING, EXACT],
            "data_wait_share": wait,
        },
        goal=f"ratio_to_ray_train >= {GOAL_RATIO:.1f}, data_wait_share <= {GOAL_WAIT}",
        met=of_peer >= GOAL_RATIO and wait <= GOAL_WAIT,
        rows=tuple(rows),
        notes=(
            "one process that trains, one that prepares, and ours that trains does so too while it waits; "
            + "; ".join(
                f"{regime.name}: {regime.build} on images of {regime.image} x {regime.image}, turns of "
                f"{regime.steps} steps after {regime.warm_up}"
                for regime in OURS
            )
            + f"; {MICRO_BATCHES} micro-batches of {BATCH} images a step",
            "ratio_to_ray_train is the smaller one of ratio_preparing and ratio_training, both with float32 "
            "sums as the peer's; ratio_with_exact_sums is where training is the bottleneck, and has no goal",
            "a ratio is the median over the rounds of our turn over the peer's; data_wait_share is the "
            "larger one, of float32 and exact sums, where training is the bottleneck",
            "ours shuffles the whole set and deals every sample once an epoch; Ray Train reads the files in "
            "order, without a shuffle, and is spared the beginning of an epoch",
        ),
    )


def run(console: Console, rounds: int = ROUNDS) -> BenchReport:
    """Measures; takes about twelve minutes. Raises RuntimeError if a job stops by itself."""
    with tempfile.TemporaryDirectory() as name, _cluster():
        folder = Path(name)
        console.print("drawing the sets", highlight=False)
        words = {}
        for number, regime in enumerate(OURS):
            (folder / f"set-{number}").mkdir()
            words[regime] = folder / f"set-{number}", write_set(folder / f"set-{number}", regime)
        recipes = {
            (regime, who): recipe(*words[regime], regime, reduction)
            for regime, ours in OURS.items()
            for who, reduction in ours.items()
        }
        peers = {regime: recipe(*words[regime], regime, "fast") for regime in OURS}
        names = {key: f"run-{number}" for number, key in enumerate(recipes)}
        measured = {names[key]: each for key, each in recipes.items()}
        with resting(measured, folder, WARM_UP_STEPS, console) as runs:
            console.print(f"starting {PEER}", highlight=False)
            with RayTrainFeed(peers, folder / "peer") as peer, Turns(_processes(runs)) as control:
                takers: dict[Key, Callable[[], Window]] = {}
                for regime, ours in OURS.items():
                    for who in ours:
                        here = names[regime, who]
                        takers[regime, who] = partial(ReknitFeed(here, runs[here], control).take, regime)
                    takers[regime, PEER] = partial(peer.take, regime)
                return report(rounds_of(takers, rounds, console))


def _cluster() -> AbstractContextManager[None]:
    """One CPU for the peer's worker, one for what prepares for it."""
    return connect(None, 1, 1.0, 0.0, more_cpus=1.0, kept_processes=KEPT_PROCESSES)


def _processes(runs: Mapping[str, RayRun]) -> dict[str, list[int]]:
    """The process that trains and the one that prepares, of each run."""
    for name, each in runs.items():
        wait_for(f"the feed worker of {name}", partial(_is_fed, each))
    return {
        name: [*each.processes().values(), *each.feed_processes().values()] for name, each in runs.items()
    }


def _is_fed(run: RayRun) -> bool:
    return bool(run.feed_processes())
