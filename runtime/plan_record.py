"""A plan as it is put on record: who does what, without what only the workers need to know."""

from __future__ import annotations

from typing import Any

from runtime.plan import Plan, Strategy


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """``{"generation", "stages": [{"first", "stop", "workers"}], "assignment": [[worker of micro-batch 0,
    ...] of stage 0, ...], "teams": [[lead, ...], ...], "shards": {worker: {"owned": elements, "kept":
    elements of others' shards, "backups": [workers that keep its own]}}}``.

    Where micro-batches skip stages, "paths" has those that each of them passes; where the strategy was
    searched for, "strategy" says it (``in_words``).

    Shards are summed up by worker: their bounds would make the record of a large plan large, and follow from
    the plan's stages.
    """
    shards = {}
    for worker in plan.workers:
        owned = list(plan.owned_by(worker))
        shards[str(worker)] = {
            "owned": sum(shard.size for shard in owned),
            "kept": sum(shard.size for shard in plan.backed_up_by(worker)),
            "backups": sorted({shard.backup for shard in owned if shard.backup is not None}),
        }
    return {
        "generation": plan.generation,
        "stages": [
            {"first": stage.first, "stop": stage.stop, "workers": list(stage.workers)}
            for stage in plan.stages
        ],
        "assignment": [list(row) for row in plan.assignment],
        "teams": [list(team) for team in plan.teams],
        "shards": shards,
        **({"paths": [list(path) for path in plan.paths]} if plan.paths else {}),
        **({"strategy": in_words(plan.strategy)} if plan.strategy is not None else {}),
    }


def in_words(strategy: Strategy) -> str:
    """ "interleaved x2, zero3, teams of 2, 3 layers recomputed": what was chosen, for a person."""
    said = [strategy.schedule + (f" x{strategy.chunks}" if strategy.chunks > 1 else ""), strategy.sharding]
    if strategy.sequence > 1:
        said.append(f"teams of {strategy.sequence}")
    if strategy.recompute:
        count = len(strategy.recompute)
        said.append(f"{count} layer{'s' * (count > 1)} recomputed")
    return ", ".join(said)
