"""What changes cost a run: joins, layers that move between stages, and steps interrupted by a loss.

Real Ray actors, really killed, drained and replaced; only the layers' compute is emulated by sleeping, so
that two cores can host them. See ``joins``, ``migrations`` and ``redo`` for what is measured how.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from actors.cluster import connect
from jobs.bench import joins, migrations, redo
from jobs.bench.report import BenchReport

WORKERS = 4


def report(joined: joins.Joins, moved: migrations.Migrations, redone: redo.Redone) -> BenchReport:
    """The table, from the three parts."""
    return BenchReport(
        bench="changes",
        headline={
            "join_pause_of_step": joined.share,
            "migration_pause_of_at_once": moved.worst_share,
            "salvage_redo_of_share": redone.share,
            "redo_without_salvage_of_share": redone.share_anew,
        },
        goal=(
            f"join_pause_of_step <= {joins.GOAL}, migration_pause_of_at_once <= {migrations.GOAL}, "
            f"salvage_redo_of_share <= {redo.GOAL} (medians of at least {joins.JOINS} joins, "
            f"{migrations.CYCLES} changes of each kind and {redo.FEWEST_KILLS} kills)"
        ),
        met=len(joined.pauses) >= joins.JOINS
        and joined.share <= joins.GOAL
        and moved.worst_share <= migrations.GOAL
        and redone.enough
        and redone.share <= redo.GOAL,
        rows=(*joins.rows(joined), *migrations.rows(moved), *redo.rows(redone)),
        notes=(
            "the layers' compute is emulated: a layer sleeps in forward and twice as long in backward; what "
            "they carry besides is updated, divided, backed up and moved for real, on one machine",
            joins.NOTE,
            migrations.note(moved),
            redo.note(redone),
        ),
    )


def run(console: Console) -> BenchReport:
    """Measures; takes about five minutes. Raises RuntimeError if a run ends by itself, does not go on after
    a change, or does not end as told."""
    with tempfile.TemporaryDirectory() as name, connect(None, WORKERS, 1.0, 0.0):
        folder = Path(name)
        return report(
            joins.measure(folder, console),
            migrations.measure(folder, console),
            redo.measure(folder, console),
        )
