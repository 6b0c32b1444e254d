"""``reknit bench goodput``: one preemption trace for Reknit, torchft and Ray Train; how much work gets done?

Four places with one worker each; compute is emulated by sleeping, the same per sample in every system, and
all of them train data-parallel. From the first commit at full strength on, one place after the other is taken
away every 10 s, by SIGKILL to all that runs there, and is given back 15 s later. What counts is samples of
committed steps, each step once however often it was done:

- *at the intended batch*: only steps of the recipe's whole batch count. torchft's steps get smaller when a
  replica is gone, so most of them do not; a second row has torchft's training loop deal the whole batch
  anew in every step, which torchft leaves to its users.
- the *ideal* is the system's own undisturbed throughput (until the first kill) for every place and second
  that the trace lends. With a kill every 10 s and newcomers after 15 s one or two of four places are
  always missing, so that no system can reach more than about 0.7 of its full strength.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec

from ray.exceptions import RayError
from rich.console import Console

from jobs.bench.goodput_systems import System, ray_train, reknit, torchft
from jobs.bench.goodput_trace import Account, Change, account, calls, trace
from jobs.bench.report import BenchReport
from jobs.bench.sleeping import recipe_of

GOAL, RATIO_GOAL = 0.90, 1.6
WINDOW_SECONDS, KILL_EVERY, NEWCOMER_AFTER = 60.0, 10.0, 15.0
LAYERS, FORWARD_SECONDS = 4, 0.0139
"""With three micro-batches for each of four workers and a backward of twice the forward, a step sleeps
for half a second."""

START_SECONDS = 150.0
"""How long a system may take until all its workers train together."""

STEPS_TOGETHER = 4
"""So many steps at full strength come before the window: the first ones pay for warming up."""

_POLL_SECONDS = 0.1

RECIPE = recipe_of(
    "bench-goodput",
    {"workers": 4, "max_workers": 4, "min_workers": 1, "stages": 1, "micro_batches": 12},
    steps=1_000_000,
    layers=LAYERS,
    forward_seconds=FORWARD_SECONDS,
)
PLACES = RECIPE.parallel.workers
BATCH = RECIPE.parallel.micro_batches * RECIPE.parallel.micro_batch_size


def endure(system: System, changes: Sequence[Change], window: float) -> Account:
    """Puts ``system`` through ``changes`` during ``window`` seconds.

    Raises RuntimeError if its workers do not come together, or if it ends.
    """
    deadline = time.monotonic() + START_SECONDS
    while system.together() < STEPS_TOGETHER:
        if time.monotonic() > deadline:
            raise RuntimeError(f"its workers did not train together within {START_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)
    begin = max(step.at for step in system.steps())
    happened: list[Change] = []
    undisturbed = None
    for moment, change in calls(changes, system.boot_seconds):
        time.sleep(max(0.0, begin + moment - time.time()))
        undisturbed = undisturbed or system.steps()  # a run that has to begin anew forgets them
        if change.given_back:
            system.give_back(change.place)
            at = time.time()
        else:
            at = system.take_away(change.place)
        happened.append(Change(at - begin, change.place, change.given_back))
    time.sleep(max(0.0, begin + window - time.time()))
    return account(
        system.steps(),
        happened,
        begin=begin,
        window=window,
        places=PLACES,
        batch=BATCH,
        undisturbed=undisturbed,
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """``account`` None: the system was not measured, for the reason that ``problem`` gives."""

    name: str
    account: Account | None
    problem: str | None = None


def measure(
    name: str, system: AbstractContextManager[System], changes: Sequence[Change], console: Console
) -> Measured:
    """A system that fails is reported, not raised: the others' figures stand without it."""
    console.print(f"{name}: {WINDOW_SECONDS:.0f} s of preemptions", highlight=False)
    try:
        with system as running:
            return Measured(name, endure(running, changes, WINDOW_SECONDS))
    except (RuntimeError, ValueError, ConnectionError, RayError) as error:
        return Measured(name, None, str(error))


REKNIT, TORCHFT, TORCHFT_DEALT, RAY_TRAIN = (
    "reknit",
    "torchft",
    "torchft, whole batch dealt by the loop",
    "Ray Train, elastic",
)


def run(console: Console) -> BenchReport:
    """Measures; about six minutes."""
    changes = trace(PLACES, WINDOW_SECONDS, KILL_EVERY, NEWCOMER_AFTER)
    measured = [measure(REKNIT, reknit(RECIPE), changes, console)]
    if find_spec("torchft") is None:
        problem = "not installed: pip install torchft==0.2.0"
        measured += [Measured(name, None, problem) for name in (TORCHFT, TORCHFT_DEALT)]
    else:
        measured.append(measure(TORCHFT, torchft(RECIPE, whole_batch=False), changes, console))
        measured.append(measure(TORCHFT_DEALT, torchft(RECIPE, whole_batch=True), changes, console))
    if find_spec("pandas") is None:
        measured.append(Measured(RAY_TRAIN, None, "not installed: pip install 'ray[train]'"))
    else:
        measured.append(measure(RAY_TRAIN, ray_train(RECIPE), changes, console))
    return report(measured)


def report(measured: Sequence[Measured]) -> BenchReport:
    """The table and the headline. Pure."""
    rows: list[dict[str, str | float | int | None]] = []
    notes = [
        f"{PLACES} places; one is taken away every {KILL_EVERY:g} s (SIGKILL to all that runs there) and "
        f"given back {NEWCOMER_AFTER:g} s later; {WINDOW_SECONDS:g} s; compute is emulated by sleeping",
        "goodput: samples of steps of the whole batch over the system's own undisturbed rate for every "
        "second of every place lent; any batch: the same with the samples of smaller steps; of full "
        "strength: as if no place were ever taken away, so at most the share of places lent; at work: "
        "workers that took part in a step; a newcomer's place is lent from when its node is part "
        "of the cluster (torchft: from when its process starts)",
    ]
    accounts = {each.name: each.account for each in measured}
    for each in measured:
        found = each.account
        rows.append(
            {
                "what": each.name,
                "goodput": found.goodput if found else None,
                "any_batch": found.generous if found else None,
                "of_full_strength": found.of_full_strength if found else None,
                "samples": found.at_batch if found else None,
                "undisturbed_per_second": found.rate if found else None,
                "places_lent": found.lent if found else None,
                "at_work": found.at_work if found else None,
                "longest_gap_seconds": found.longest_gap if found else None,
            }
        )
        if each.problem is not None:
            notes.append(f"{each.name}: not measured: {each.problem}")
    mine = accounts.get(REKNIT)
    to_torchft = _ratio(mine, accounts.get(TORCHFT))
    dealt = _ratio(mine, accounts.get(TORCHFT_DEALT))
    if dealt is not None:
        notes.append(
            f"against a torchft whose loop deals the whole batch anew in each step, the ratio is {dealt:.3g}"
        )
    goodput = mine.goodput if mine else None
    return BenchReport(
        bench="goodput",
        headline={
            "reknit_goodput": goodput,
            "ratio_to_torchft": to_torchft,
            "ratio_to_ray_train": _ratio(mine, accounts.get(RAY_TRAIN)),
        },
        goal=f"reknit_goodput >= {GOAL} and ratio_to_torchft >= {RATIO_GOAL}",
        met=goodput is not None and goodput >= GOAL and to_torchft is not None and to_torchft >= RATIO_GOAL,
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _ratio(mine: Account | None, peer: Account | None) -> float | None:
    """None where there is nothing to divide by."""
    if mine is None or peer is None or peer.goodput == 0:
        return None
    return mine.goodput / peer.goodput
