"""What a recipe makes of the manifests under ``k8s/``: the files of a kustomize component, as text.

Pure: a recipe and the machines it is to run on go in, file names and their contents come out. The component
holds everything that depends on a recipe: numbers and sizes of pods, the image, the recipe itself, what a job
runs and what is served.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import tomli_w
import yaml

from jobs.curation.recipe import CurationRecipe
from jobs.pods import (
    IMAGE,
    OVERHEAD_GIB,
    Machines,
    Pod,
    Replicas,
    object_name,
    shared_out,
    training_pod,
    training_replicas,
)
from jobs.recipe.recipe import Recipe
from jobs.yaml_text import to_yaml

RESERVED, SPOT = 0, 1
"""The places of the two groups in the cluster's list."""

NAMESPACE = "reknit"

DATA = "/data"
"""Where pods have the shared volume; relative paths of a recipe lie under it."""


def training_files(recipe: Recipe, machines: Machines, namespace: str = NAMESPACE) -> dict[str, str]:
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
        namespace,
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
        goes_out=_has_uri(recipe.checkpoint.folder) or _has_uri(recipe.data.arguments),
    )


def curation_files(
    recipe: CurationRecipe, machines: Machines, pods: tuple[int, int], cpus: int, namespace: str = NAMESPACE
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
        namespace,
        machines,
        Pod(cpus, machines.memory_gib + OVERHEAD_GIB),
        shared_out(least, least, most, machines.reserved),
        {
            "RayJob": [
                _put("/metadata/name", object_name(recipe.set.name)),
                _put("/spec/entrypoint", "bash /etc/reknit/curate.sh"),
            ]
        },
        goes_out=_has_uri(recipe.set.folder) or _has_uri(recipe.source.path),
    )


def _component(
    recipe: str,
    namespace: str,
    machines: Machines,
    pod: Pod,
    groups: tuple[Replicas, Replicas],
    patches: Mapping[str, list[dict[str, Any]]],
    *,
    goes_out: bool,
) -> dict[str, str]:
    """``patches`` by kind. A patch whose object an overlay does not have is left out by kustomize."""
    if object_name(namespace) != namespace:
        raise ValueError(f"{namespace!r} names no namespace: use small letters, digits and dashes")
    found = IMAGE.fullmatch(machines.image)
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
        "namespace": namespace,
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
    files = {"kustomization.yaml": to_yaml(kustomization), "recipe.toml": recipe}
    for kind, patch in all_patches.items():
        files[f"{kind.lower()}.yaml"] = to_yaml(patch)
    if goes_out:
        files["egress.yaml"] = to_yaml(_EGRESS)
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


def _has_uri(value: object) -> bool:
    """Whether it is the address of something that is not on this machine, or holds one at any depth."""
    if isinstance(value, Mapping):
        return any(map(_has_uri, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_uri, value))
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
