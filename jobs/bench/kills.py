"""From commits and kills to seconds of recovery. Pure, and the same for every system that is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

PATIENCE_SECONDS = 20.0
"""How long a peer may take from a kill to its next commit: four times torchft's heartbeat timeout."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A committed step. ``at`` is in seconds since 1970, ``losses`` grows with every change of
    membership that the step already knew of.
    """

    at: float
    losses: int


@dataclass(frozen=True, slots=True)
class Recovery:
    """One kill. All in seconds.

    ``seconds``: from the kill to the first commit by the new membership, less an undisturbed step.
    ``any_commit_seconds``: the same up to whatever commit came first; survivors that had all they needed
    from the dead worker still commit the step that was under way.
    """

    seconds: float
    any_commit_seconds: float
    undisturbed_seconds: float


def recovery(commits: Sequence[Commit], killed_at: float) -> Recovery | None:
    """What the kill at ``killed_at`` cost; None if no commit by a new membership followed it.

    ``commits`` are those of the survivors, ascending in time. The undisturbed step is the median interval
    between commits of the membership that the kill met. Raises ValueError if it made fewer than two.
    """
    before = [commit for commit in commits if commit.at <= killed_at]
    current = before[-1].losses if before else 0  # the last one's: at the start torchft's members grow
    times = [commit.at for commit in before if commit.losses == current]
    if len(times) < 2:
        raise ValueError("the kill came before two steps were committed: wait longer between kills")
    step_seconds = median(later - earlier for earlier, later in pairwise(times))
    redone = [commit.at for commit in commits if commit.at > killed_at and commit.losses > current]
    if not redone:
        return None
    first = min(commit.at for commit in commits if commit.at > killed_at)
    return Recovery(
        seconds=redone[0] - killed_at - step_seconds,
        any_commit_seconds=first - killed_at - step_seconds,
        undisturbed_seconds=step_seconds,
    )


def summary(
    name: str, recoveries: Sequence[Recovery], batch_after: int
) -> dict[str, str | float | int | None]:
    """A row of the table."""
    seconds = [each.seconds for each in recoveries]
    return {
        "what": name,
        "kills": len(recoveries),
        "median_seconds": median(seconds) if seconds else None,
        "worst_seconds": max(seconds) if seconds else None,
        "step_seconds": median(each.undisturbed_seconds for each in recoveries) if seconds else None,
        "batch_after": batch_after,
    }


def phase_row(name: str, seconds: Sequence[float]) -> dict[str, str | float | int | None]:
    """A row for one phase of the recoveries, in the columns of ``summary``."""
    return {
        "what": name,
        "kills": len(seconds),
        "median_seconds": median(seconds) if seconds else None,
        "worst_seconds": max(seconds) if seconds else None,
        "step_seconds": None,
        "batch_after": None,
    }
