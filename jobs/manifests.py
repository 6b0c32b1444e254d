"""What a recipe makes of the manifests under ``k8s/``: the files of a kustomize component, as text.

Pure: a recipe and the machines it is to run on go in, file names and their contents come out. The component
holds everything that depends on a recipe: numbers and sizes of pods, the image, the recipe itself, what a job
runs and what is served. Sizes of memory are in GiB; a pod is one Ray node and one failure domain.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tomli_w
import yaml

from jobs.curation.recipe import CurationRecipe
from jobs.recipe import Recipe

OVERHEAD_GIB = 3.0
"""What a pod takes beside its workers: Ray's object store of 1 GiB, its daemons, what is in /tmp."""

RESERVED, SPOT = 0, 1
"""The places of the two groups in the cluster's list."""

DATA = "/data"
"""Where pods have the shared volume; relative paths of a recipe lie under it."""

LONGEST_NAME = 47
"""KubeRay refuses longer names of a RayJob or RayService."""

_IMAGE = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9._-]*(?::\d+)?(?:/[a-z0-9][a-z0-9._-]*)*)"
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
        found = _IMAGE.fullmatch(self.image)
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
    counts = (parallel.min_workers, parallel.workers, most)
    return _shared(*(math.ceil(count / machines.workers_per_pod) for count in counts), machines.reserved)


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


def training_files(recipe: Recipe, machines: Machines) -> dict[str, str]:
    """The component for training and serving ``recipe``. Raises ValueError."""
    name = object_name(recipe.run.name)
    pod, groups = training_pod(recipe, machines), training_replicas(recipe, machines)
    folder = f"{DATA}/runs/{name}"
    most = sum(group.most for group in groups) * machines.workers_per_pod
    service = {
        "applications": [
            {
                "name": "reknit",
                "route_prefix": "/",
                "import_path": "jobs.serving.deployed:app",
                "args": {"run": folder, "least": 1, "most": most, "threads": recipe.parallel.threads},
            }
        ]
    }
    return _component(
        recipe.to_toml(),
        machines,
        pod,
        groups,
        {
            "RayJob": [
                _put("/metadata/name", name),
                _put("/spec/entrypoint", f"bash /etc/reknit/train.sh {folder}"),
            ],
            "RayService": [
                _put("/metadata/name", name),
                _put("/spec/serveConfigV2", yaml.safe_dump(service, sort_keys=False)),
            ],
        },
        goes_out=_is_uri(recipe.checkpoint.folder) or any(map(_is_uri, recipe.data.arguments.values())),
    )


def curation_files(
    recipe: CurationRecipe, machines: Machines, pods: tuple[int, int], cpus: int
) -> dict[str, str]:
    """The component for curating ``recipe`` on ``pods`` (least, most) of ``cpus`` each. Raises ValueError."""
    least, most = pods
    if not 1 <= least <= most:
        raise ValueError(
            f"pods from {least} to {most} make no sense: give two numbers from 1 on, the second at "
            "least the first"
        )
    if cpus < 1:
        raise ValueError(f"cpus is {cpus}: it must be at least 1")
    return _component(
        tomli_w.dumps(recipe.model_dump(exclude_none=True)),
        machines,
        Pod(cpus, machines.memory_gib + OVERHEAD_GIB),
        _shared(least, least, most, machines.reserved),
        {
            "RayJob": [
                _put("/metadata/name", object_name(recipe.set.name)),
                _put("/spec/entrypoint", "bash /etc/reknit/curate.sh"),
            ]
        },
        goes_out=_is_uri(recipe.set.folder) or _is_uri(recipe.source.path),
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


def _shared(least: int, start: int, most: int, reserved: int | None) -> tuple[Replicas, Replicas]:
    """Pods as reserved ones, which stay, and spot ones, which come and go."""
    reserved = least if reserved is None else reserved
    if reserved > most:
        raise ValueError(
            f"reserved is {reserved}, but there is no use for more than {most} pods: lower it, or raise the "
            "most workers (or pods) that there may be"
        )
    spot = Replicas(max(0, least - reserved), max(0, start - reserved), most - reserved)
    return Replicas(reserved, reserved, reserved), spot


def _component(
    recipe: str,
    machines: Machines,
    pod: Pod,
    groups: tuple[Replicas, Replicas],
    patches: Mapping[str, list[dict[str, Any]]],
    *,
    goes_out: bool,
) -> dict[str, str]:
    """``patches`` by kind. A patch whose object an overlay does not have is left out by kustomize."""
    found = _IMAGE.fullmatch(machines.image)
    assert found is not None, machines
    image = {"name": "reknit", "newName": found["name"]}
    image |= {"digest": found["digest"]} if found["digest"] else {"newTag": found["tag"]}
    all_patches = {
        "RayCluster": _cluster_patch(machines, pod, groups),
        "StatefulSet": [_put("/spec/template/spec/affinity", _not_on(machines.spot_label))],
        **patches,
    }
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        **({"resources": ["egress.yaml"]} if goes_out else {}),
        "images": [image],
        "configMapGenerator": [
            {
                "name": "reknit-recipe",
                "files": ["recipe.toml"],
                "options": {
                    "disableNameSuffixHash": True,
                    "labels": {"app.kubernetes.io/part-of": "reknit"},
                },
            }
        ],
        "patches": [{"target": {"kind": kind}, "path": f"{kind.lower()}.yaml"} for kind in all_patches],
    }
    files = {"kustomization.yaml": _yaml(kustomization), "recipe.toml": recipe}
    for kind, patch in all_patches.items():
        files[f"{kind.lower()}.yaml"] = _yaml(patch)
    if goes_out:
        files["egress.yaml"] = _yaml(_EGRESS)
    return files


def _cluster_patch(machines: Machines, pod: Pod, groups: tuple[Replicas, Replicas]) -> list[dict[str, Any]]:
    size: dict[str, Any] = {"cpu": str(pod.cpus), "memory": f"{math.ceil(pod.memory_gib * 1024)}Mi"}
    if pod.gpus:
        size[machines.accelerator] = str(pod.gpus)
    patch = [_put("/spec/headGroupSpec/template/spec/affinity", _not_on(machines.spot_label))]
    for place, label in ((RESERVED, machines.reserved_label), (SPOT, machines.spot_label)):
        group, spec = f"/spec/workerGroupSpecs/{place}", f"/spec/workerGroupSpecs/{place}/template/spec"
        replicas = groups[place]
        patch += [
            _put(f"{group}/minReplicas", replicas.least),
            _put(f"{group}/replicas", replicas.start),
            _put(f"{group}/maxReplicas", replicas.most),
            _put(f"{spec}/nodeSelector", dict([label])),
            _put(f"{spec}/containers/0/resources", {"requests": size, "limits": size}),
        ]
        if pod.resources:
            amounts = {name: f"{amount:g}" for name, amount in pod.resources}
            patch.append(_put(f"{group}/resources", amounts))
        if place == SPOT:
            key, value = label
            toleration = {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
            patch.append(_put(f"{spec}/tolerations/-", toleration))
        if pod.gpus and machines.accelerator != "nvidia.com/gpu":
            toleration = {"key": machines.accelerator, "operator": "Exists", "effect": "NoSchedule"}
            patch.append(_put(f"{spec}/tolerations/-", toleration))
    return patch


def _put(path: str, value: Any) -> dict[str, Any]:
    """A JSON Patch operation (RFC 6902) that sets ``path``, whether it is there or not."""
    return {"op": "add", "path": path, "value": value}


def _not_on(label: tuple[str, str]) -> dict[str, Any]:
    """The affinity of what must not be lost with a spot machine."""
    key, value = label
    terms = [{"matchExpressions": [{"key": key, "operator": "NotIn", "values": [value]}]}]
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


class _Dumper(yaml.SafeDumper):
    """Every value in full, texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(value: Any) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False)
    return f"# Written by `reknit k8s render`.\n{text}"


def _is_uri(value: object) -> bool:
    return isinstance(value, str) and "://" in value and not value.startswith("file://")


_EGRESS: dict[str, Any] = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "reknit-storage", "labels": {"app.kubernetes.io/part-of": "reknit"}},
    "spec": {
        "podSelector": {
            "matchLabels": {"app.kubernetes.io/part-of": "reknit"},
            "matchExpressions": [
                {"key": "app.kubernetes.io/component", "operator": "In", "values": ["head", "worker"]}
            ],
        },
        "policyTypes": ["Egress"],
        "egress": [{"ports": [{"port": 443}]}],
    },
}
"""The way out to a recipe's URIs: HTTPS to anywhere, since an object store's addresses change."""
