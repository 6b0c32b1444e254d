"""What a recipe may say of who keeps which parameters, sums and optimizer states."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from strategies.shardings.registry import DEFAULT, SHARDINGS


def _check_name(value: str) -> str:
    if value not in SHARDINGS:
        raise ValueError(f"must be one of {', '.join(SHARDINGS)}")
    return value


ShardingName = Annotated[str, AfterValidator(_check_name)]


def check_sharding(sharding: str, offloads: bool, reduction: str, engine: str) -> None:
    """Raises ValueError for a combination that cannot be."""
    entry = SHARDINGS[sharding]
    if engine != "reknit" and (sharding != DEFAULT or offloads):
        key = "sharding" if sharding != DEFAULT else "offload"
        raise ValueError(
            f"parallel.{key} is of Reknit's own engine: remove it, and let the file that engine.config names "
            f"({engine}) say how to shard."
        )
    if reduction == "fast" and not entry.ordered:
        ordered = " or ".join(name for name, each in SHARDINGS.items() if each.ordered)
        raise ValueError(
            f"parallel.sharding ({sharding}) adds gradients as they come, on which the bits of reduction = "
            f'"fast" would depend: set reduction to "exact", or parallel.sharding to {ordered}.'
        )
    if offloads and not entry.keeps.parameters:
        whole = ", ".join(name for name, each in SHARDINGS.items() if each.keeps.parameters)
        raise ValueError(
            f"parallel.offload has no meaning with parallel.sharding ({sharding}), which keeps no parameters "
            f"on the device: remove parallel.offload, or set parallel.sharding to one of {whole}."
        )
