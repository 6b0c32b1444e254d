"""How many workers a person may ask for, and who goes where there are more than that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set

from runtime.plan import WorkerId


def problem_of_size(workers: int, min_workers: int, first: int, max_workers: int | None) -> str | None:
    """Why a run cannot be resized to ``workers``, in a sentence; None where it can.

    ``first``: how many the recipe begins with, which is the most where it gives no ``max_workers``.
    """
    most = first if max_workers is None else max(max_workers, first)
    if min_workers <= workers <= most:
        return None
    if workers < min_workers:
        reason = f"parallel.min_workers is {min_workers}"
    elif max_workers is None:
        reason = f"its recipe begins with {first} and gives no parallel.max_workers"
    else:
        reason = f"parallel.max_workers is {most}"
    allowed = f"{most}" if min_workers == most else f"a number from {min_workers} to {most}"
    return f"the run cannot have {workers} workers, because {reason}: name {allowed}"


def surplus(domains: Mapping[WorkerId, str], at_work: Set[WorkerId], keep: int) -> tuple[WorkerId, ...]:
    """Who leaves so that ``keep`` of the workers, given with their failure domains, remain; ascending.

    First those without work. Then whole domains are emptied, the smallest first, so that their machines
    can be given back; but two domains are kept as long as two workers are, so that every shard can have its
    backup in another one than its own.
    """
    left = dict(domains)
    gone: list[WorkerId] = []
    while len(left) > max(keep, 0):
        sizes = Counter(left.values())
        idle = [worker for worker in left if worker not in at_work]
        last_pair = len(sizes) == 2 and keep >= 2

        def order(
            worker: WorkerId, sizes: Counter[str] = sizes, last_pair: bool = last_pair
        ) -> tuple[int, int]:
            size = sizes[left[worker]]
            return (-size if last_pair else size, -worker)

        leaver = min(idle or left, key=order)
        gone.append(leaver)
        del left[leaver]
    return tuple(sorted(gone))
