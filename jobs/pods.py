"""How many pods a recipe needs, and how large: pure arithmetic, without a word of YAML.

A pod is one Ray node and one failure domain. Sizes of memory are in GiB.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from jobs.recipe.recipe import Recipe

OVERHEAD_GIB = 3.0
"""What a pod takes beside its workers: Ray's object store of 1 GiB, and its daemons."""

LONGEST_NAME = 47
"""KubeRay refuses longer names of a RayJob or RayService."""

IMAGE = re.compile(
    r"(?P<name>(?:[a-z0-9][a-z0-9.-]*(?::\d+)?/)?[a-z0-9][a-z0-9._-]*(?:/[a-z0-9][a-z0-9._-]*)*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_LABEL = re.compile(r"(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9](?:[\w.-]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Machines:
    """What the cluster's nodes offer. ``image`` names a version. ``workers_per_pod`` share a failure domain.

    ``reserved`` pods are always there (None: as many as the least workers need), others on spot machines.
    ``memory_gib`` is one worker's. ``accelerator`` is the resource that a GPU is. The node labels are
    (key, value); spot machines may bear the same as a taint. Raises ValueError.
    """

    image: str
    workers_per_pod: int = 1
    reserved: int | None = None
    memory_gib: float = 4.0
    accelerator: str = "nvidia.com/gpu"
    reserved_label: tuple[str, str] = ("reknit.dev/capacity", "reserved")
    spot_label: tuple[str, str] = ("reknit.dev/capacity", "spot")

    def __post_init__(self) -> None:
        found = IMAGE.fullmatch(self.image)
        if found is None:
            raise ValueError(f"{self.image!r} names no image: write it as registry/name:tag")
        if found["digest"] is None and found["tag"] in (None, "latest"):
            raise ValueError(
                f"{self.image} names no version, so nodes that join later may run another one: add a tag "
                "or a digest"
            )
        if self.workers_per_pod < 1:
            raise ValueError(f"workers-per-pod is {self.workers_per_pod}: it must be at least 1")
        if self.reserved is not None and self.reserved < 0:
            raise ValueError(f"reserved is {self.reserved}: it must be at least 0")
        if not 0 < self.memory_gib < math.inf:
            raise ValueError(f"memory-gib is {self.memory_gib}: it must be above 0")
        for key, value in (self.reserved_label, self.spot_label):
            if not _LABEL.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                raise ValueError(f"{key}={value} is no node label: write it as key=value")
        if not _LABEL.fullmatch(self.accelerator):
            raise ValueError(f"{self.accelerator!r} names no resource: write it as nvidia.com/gpu")


@dataclass(frozen=True, slots=True)
class Pod:
    """What one worker pod takes up. ``resources`` are Ray's custom ones."""

    cpus: int
    memory_gib: float
    gpus: int = 0
    resources: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many pods of a group there are at least, at the start, and at most."""

    least: int
    start: int
    most: int


def training_replicas(recipe: Recipe, machines: Machines) -> tuple[Replicas, Replicas]:
    """How many reserved and how many spot pods a training run may have. Raises ValueError."""
    parallel = recipe.parallel
    most = (parallel.max_workers or parallel.workers) + parallel.spares
    least, start, most = (
        math.ceil(count / machines.workers_per_pod)
        for count in (parallel.min_workers, parallel.workers, most)
    )
    return shared_out(least, start, most, machines.reserved)


def training_pod(recipe: Recipe, machines: Machines) -> Pod:
    """What a pod takes up that holds ``workers_per_pod`` workers, and its part of the feed workers."""
    parallel, data, each = recipe.parallel, recipe.data, machines.workers_per_pod
    pods = math.ceil(parallel.workers / each)
    feeding = math.ceil(data.feed_workers / pods) * data.feed_cpus
    return Pod(
        cpus=max(1, math.ceil(each * parallel.cpus_per_worker + feeding)),
        memory_gib=each * machines.memory_gib + OVERHEAD_GIB,
        gpus=math.ceil(each * parallel.gpus_per_worker),
        resources=tuple((name, each * amount) for name, amount in sorted(parallel.resources.items())),
    )


def object_name(name: str) -> str:
    """``name`` as Kubernetes wants names: lower case, digits and dashes. Raises ValueError."""
    made = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not made[:1].isalpha():
        made = f"run-{made}".rstrip("-")
    if len(made) > LONGEST_NAME:
        raise ValueError(
            f"the name {name!r} is too long for Kubernetes: choose one of at most {LONGEST_NAME} characters"
        )
    return made


def shared_out(least: int, start: int, most: int, reserved: int | None) -> tuple[Replicas, Replicas]:
    """Pods as reserved ones, which stay, and spot ones, which come and go."""
    reserved = least if reserved is None else reserved
    if reserved > most:
        raise ValueError(
            f"reserved is {reserved}, but there is no use for more than {most} pods: lower it, or raise the "
            "most workers (or pods) that there may be"
        )
    spot = Replicas(max(0, least - reserved), max(0, start - reserved), most - reserved)
    return Replicas(reserved, reserved, reserved), spot
