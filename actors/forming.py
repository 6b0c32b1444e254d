"""The first workers of a run: asked for all at once, waited for as long as that makes sense."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.crew import RayCrew
from actors.names import first_line
from actors.ray_worker import Ready
from runtime.plan import WorkerId

START_SECONDS = 300.0
"""How long the first workers may take to be placed and warmed up before the run begins without the others."""

LOOK_SECONDS = 0.5
"""Between two looks at whether it still makes sense to wait."""


@dataclass(frozen=True, slots=True)
class FirstWorkers:
    """Who is ready; who did not make it, and why; and for whom Ray has had no room so far, or who is still
    warming up: they are on their way as later ones are."""

    ready: dict[WorkerId, Ready]
    lost: dict[WorkerId, str]
    starting: dict[WorkerId, Any]


def bring(crew: RayCrew, workers: range, least: int, stopped: Callable[[], bool]) -> FirstWorkers:
    """Asks for ``workers`` and waits for all of them ``START_SECONDS``, for the ``least`` that the run cannot
    do without as long as it takes where an autoscaler may bring nodes; until ``stopped`` at most.

    Raises ValueError for a worker that could not start for a reason of its own.
    """
    pending = {crew.create(worker): worker for worker in workers}
    deadline = time.monotonic() + START_SECONDS
    found = FirstWorkers({}, {}, {})
    while pending and not stopped():
        done, _ = ray.wait(list(pending), num_returns=1, timeout=LOOK_SECONDS)
        if not done:
            if time.monotonic() > deadline and (len(found.ready) >= least or not nodes_may_come()):
                break
            continue
        worker = pending.pop(done[0])
        try:
            found.ready[worker] = ray.get(done[0])
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise ValueError(str(error.cause)) from None
            raise ValueError(f"worker {worker} could not start: {error}") from None
        except RayActorError as error:
            found.lost[worker] = first_line(error)
    found.starting.update({worker: reference for reference, worker in pending.items()})
    return found


def nodes_may_come() -> bool:
    """Whether an autoscaler reports to this Ray cluster."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # there is no public way to ask
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

    reply = GetClusterStatusReply()
    address = ray.get_runtime_context().gcs_address
    try:
        reply.ParseFromString(GcsClient(address=address).get_cluster_status())
    except Exception:  # the head is away: whoever waits for nodes waits for it as well
        return True
    return bool(reply.autoscaling_state.autoscaler_state_version)
