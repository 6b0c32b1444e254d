"""What a run's actors are called on Ray, and how its errors are told in a line."""

from __future__ import annotations

import re

from runtime.plan import WorkerId

NAMESPACE = "reknit"
"""Of all actors of all runs; their names begin with the run's."""

NODE_LABEL = "ray.io/node-id"
"""The label that Ray gives every node."""

LEFT_NODE = "its node is to be left"
"""Why workers of an avoided or emptied node go."""

UNAVAILABLE_SECONDS = 0.2
"""Until Ray is asked again about an actor that it cannot reach."""


def worker_name(run: str, worker: WorkerId) -> str:
    return f"{run}/worker-{worker}"


def controller_name(run: str) -> str:
    return f"{run}/controller"


def controller_pattern(folder: str) -> str:
    """What the controllers of runs are called whose folder is called so; a run's name is its folder's and six
    hexadecimal digits."""
    return controller_name(re.escape(folder) + "-[0-9a-f]{6}")


def feed_name(run: str, number: int) -> str:
    return f"{run}/feed-{number}"


def run_of(name: str) -> str:
    """The run that the actor of this name belongs to."""
    return name.rpartition("/")[0]


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
