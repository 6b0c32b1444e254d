"""As much of KubeRay's operator as autoscaling needs: a RayCluster's pods, made and deleted through the API.

The rules are KubeRay 1.7's for clusters with an autoscaler: failed pods are deleted, then those that the
autoscaler names; what is then missing to ``replicas`` is created; none is ever chosen at random. A pod on its
way out counts until it is gone. There is no scheduler here either, so pods name their node themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.support.kubernetes.client import Api
from tests.support.kubernetes.objects import Object

HEAD_GROUP = "headgroup"
ENDED = ("Failed", "Succeeded")


@dataclass(frozen=True, slots=True)
class Deeds:
    """Names of pods to delete, and pods to create."""

    delete: tuple[str, ...]
    create: tuple[Object, ...]


class RayOperator:
    """``reconcile`` is to be called again and again."""

    def __init__(self, api: Api, node: str) -> None:
        self._api, self._node = api, node

    def reconcile(self) -> None:
        for cluster in self._api.clusters.all():
            deeds = due(cluster, self._api.pods.of(cluster["metadata"]["name"]), self._node)
            for name in deeds.delete:
                self._api.pods.delete(name)
            for pod in deeds.create:
                self._api.pods.create(pod)


def due(cluster: Object, pods: Sequence[Object], node: str) -> Deeds:
    """What is to be done so that ``cluster`` has the pods that its specification asks for. Pure."""
    heads = [pod for pod in pods if pod["metadata"]["labels"]["ray.io/node-type"] == "head"]
    if not heads:
        return Deeds((), (head_pod(cluster, node),))
    address = heads[0]["status"].get("podIP")
    if address is None:
        return Deeds((), ())
    delete: list[str] = []
    create: list[Object] = []
    for group in cluster["spec"]["workerGroupSpecs"]:
        mine = [pod for pod in pods if pod["metadata"]["labels"]["ray.io/group"] == group["groupName"]]
        named = group.get("scaleStrategy", {}).get("workersToDelete") or ()
        for pod in list(mine):
            name = pod["metadata"]["name"]
            if pod["status"].get("phase") in ENDED or name in named:
                mine.remove(pod)
                if "deletionTimestamp" not in pod["metadata"]:
                    delete.append(name)
        wanted = min(max(group["replicas"], group["minReplicas"]), group["maxReplicas"])
        create += [worker_pod(cluster, group, address, node)] * max(wanted - len(mine), 0)
    return Deeds(tuple(delete), tuple(create))


def head_pod(cluster: Object, node: str) -> Object:
    """Ray's head and, beside it, Ray's autoscaler."""
    name, spec = cluster["metadata"]["name"], cluster["spec"]["headGroupSpec"]
    template = spec["template"]["spec"]
    port = spec["rayStartParams"]["port"]
    ray = template["containers"][0]
    start = ["ray", "start", "--head", "--no-monitor", "--block", *_options(spec)]
    autoscaler = {
        "name": "autoscaler",
        "image": ray["image"],
        "command": [
            *("ray", "kuberay-autoscaler", "--cluster-name", "$(RAY_CLUSTER_NAME)"),
            *("--cluster-namespace", "$(RAY_CLUSTER_NAMESPACE)", "--gcs-address", f"$(POD_IP):{port}"),
        ],
        "env": [
            *_identity(name),
            _field("RAY_CLUSTER_NAMESPACE", "metadata.namespace"),
            _field("RAY_HEAD_POD_NAME", "metadata.name"),
            _field("POD_IP", "status.podIP"),
            {"name": "KUBERAY_CRD_VER", "value": "v1"},
            *cluster["spec"]["autoscalerOptions"].get("env", ()),
        ],
    }
    head = {
        **ray,
        "command": start,
        "env": [*_identity(name), {"name": "RAY_enable_autoscaler_v2", "value": "1"}, *ray.get("env", ())],
    }
    metadata = {"name": f"{name}-head", "labels": _labels(name, "head", HEAD_GROUP)}
    return _pod(metadata, {**template, "containers": [head, autoscaler]}, node)


def worker_pod(cluster: Object, group: Object, head: str, node: str) -> Object:
    name, template = cluster["metadata"]["name"], group["template"]["spec"]
    port = cluster["spec"]["headGroupSpec"]["rayStartParams"]["port"]
    ray = template["containers"][0]
    worker = {
        **ray,
        "command": ["ray", "start", f"--address={head}:{port}", "--block", *_options(group)],
        "env": [*_identity(name), *ray.get("env", ())],
    }
    metadata = {
        "generateName": f"{name}-{group['groupName']}-worker-",
        "labels": _labels(name, "worker", group["groupName"]),
    }
    return _pod(metadata, {**template, "containers": [worker]}, node)


def _pod(metadata: Object, spec: Object, node: str) -> Object:
    placed = {**spec, "nodeName": node, "restartPolicy": "Never"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": placed}


def _labels(cluster: str, kind: str, group: str) -> dict[str, str]:
    return {
        "ray.io/cluster": cluster,
        "ray.io/node-type": kind,
        "ray.io/group": group,
        "ray.io/is-ray-node": "yes",
    }


def _options(group: Object) -> list[str]:
    options = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
    labels = group.get("labels", {})
    return [*options, "--labels=" + ",".join(f"{k}={v}" for k, v in labels.items())] if labels else options


def _identity(cluster: str) -> list[dict[str, Any]]:
    """By this a Ray node says which pod it is."""
    return [
        {"name": "RAY_CLUSTER_NAME", "value": cluster},
        _field("RAY_CLOUD_INSTANCE_ID", "metadata.name"),
        _field("RAY_NODE_TYPE_NAME", "metadata.labels['ray.io/group']"),
    ]


def _field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
