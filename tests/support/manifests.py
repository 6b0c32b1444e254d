"""Manifests as kustomize builds them, and KubeRay's schemas to hold them against."""

from __future__ import annotations

import functools
import lzma
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
SHIPPED = ROOT / "k8s"
OVERLAYS = ("cluster", "train", "curate", "serve")
DEFINITIONS = ROOT / "tests" / "data" / "kuberay"
CUSTOM = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}

Object = dict[str, Any]

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not installed, which builds the overlays"
)


@functools.cache
def _built(folder: Path) -> str:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(folder: Path) -> list[Object]:
    """What ``kubectl apply -k folder`` would send."""
    return list(yaml.safe_load_all(_built(folder)))


def only(objects: list[Object], kind: str, name: str | None = None) -> Object:
    found = [o for o in objects if o["kind"] == kind and name in (None, o["metadata"]["name"])]
    assert len(found) == 1, [o["metadata"]["name"] for o in found]
    return found[0]


def cluster_spec(objects: list[Object]) -> Object:
    """The RayCluster's spec, wherever the overlay has it."""
    for each in objects:
        match each["kind"]:
            case "RayCluster":
                return dict(each["spec"])
            case "RayJob":
                return dict(each["spec"]["rayClusterSpec"])
            case "RayService":
                return dict(each["spec"]["rayClusterConfig"])
    raise AssertionError("there is no cluster")


def pod_templates(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Every pod that the objects make, by what makes it. The containers that the operator adds and for which
    the custom resource has the say are among the head's."""
    spec = cluster_spec(objects)
    head = dict(spec["headGroupSpec"]["template"])
    options = spec["autoscalerOptions"]
    autoscaler = {"name": "autoscaler", **{k: v for k, v in options.items() if k in _CONTAINER_FIELDS}}
    yield "head", {**head, "spec": {**head["spec"], "containers": [*head["spec"]["containers"], autoscaler]}}
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    for each in objects:
        if each["kind"] == "RayJob":
            yield "submitter", each["spec"]["submitterPodTemplate"]
        elif each["kind"] in ("StatefulSet", "Deployment", "DaemonSet", "Job"):
            yield each["metadata"]["name"], each["spec"]["template"]


_CONTAINER_FIELDS = ("resources", "securityContext", "volumeMounts", "env", "envFrom", "args", "command")


@functools.cache
def schema(kind: str) -> Object:
    """KubeRay's schema of ``kind``, made to refuse fields that it does not know (a server drops them)."""
    text = lzma.decompress((DEFINITIONS / f"{CUSTOM[kind]}.yaml.xz").read_bytes())
    definition = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    closed: Object = _closed(version["schema"]["openAPIV3Schema"])
    closed["properties"]["metadata"] = {
        "type": "object"
    }  # the server's own, of which the definition is silent
    return closed


def part(kind: str, *path: str) -> Object:
    """A part of a schema: core objects that KubeRay's definitions contain whole."""
    found = schema(kind)
    for name in path:
        found = found["items"] if name == "[]" else found["properties"][name]
    return found


def _closed(node: Any) -> Any:
    if isinstance(node, list):
        return [_closed(each) for each in node]
    if not isinstance(node, Mapping):
        return node
    made = {key: _closed(value) for key, value in node.items() if key not in ("description", "format")}
    is_object = node.get("type") == "object" and isinstance(node.get("properties", {}), Mapping)
    if (
        is_object
        and "additionalProperties" not in node
        and not node.get("x-kubernetes-preserve-unknown-fields")
    ):
        made["additionalProperties"] = False
    return made
