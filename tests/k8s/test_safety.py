"""What the manifests promise about safety, for every pod of every overlay."""

from __future__ import annotations

import math
import re
import tomllib
from typing import Any

import pytest
import ray
from ray._private import ray_constants

from actors.ray_worker import TERM_SECONDS
from tests.support.manifests import (
    OVERLAYS,
    ROOT,
    SHIPPED,
    Object,
    build,
    cluster_spec,
    needs_kubectl,
    only,
    pod_templates,
)

pytestmark = needs_kubectl

SECRET_WORDS = re.compile("token|secret|password|credential|_key$|auth", re.IGNORECASE)
KILL_MARGIN = 10.0
"""Seconds beyond the drain that Ray may need to end its processes."""

PODS = [
    pytest.param(overlay, maker, template, id=f"{overlay}-{maker}")
    for overlay in (OVERLAYS if needs_kubectl.args[0] is False else ())
    for maker, template in pod_templates(build(SHIPPED / "overlays" / overlay))
]


def containers(template: Object) -> list[Object]:
    spec = template["spec"]
    return [*spec["containers"], *spec.get("initContainers", ())]


def test_there_are_pods_to_look_at() -> None:
    assert {param.id for param in PODS} >= {
        "cluster-head",
        "cluster-reserved",
        "cluster-spot",
        "train-submitter",
        "curate-submitter",
        "serve-head",
        "serve-reknit-redis",
    }


@pytest.mark.parametrize(("overlay", "maker", "template"), PODS)
def test_no_container_is_without_limits(overlay: str, maker: str, template: Object) -> None:
    for container in containers(template):
        resources = container["resources"]
        assert resources["limits"].keys() >= {"cpu", "memory"}, container["name"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"], container["name"]
    for volume in template["spec"].get("volumes", ()):
        assert "hostPath" not in volume
        if "emptyDir" in volume:
            assert volume["emptyDir"].get("sizeLimit"), volume["name"]


@pytest.mark.parametrize(("overlay", "maker", "template"), PODS)
def test_nobody_is_root_or_can_become_it(overlay: str, maker: str, template: Object) -> None:
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not any(spec.get(each) for each in ("hostNetwork", "hostPID", "hostIPC"))
    for container in containers(template):
        context = container["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert not context.get("privileged")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_itself_refuses_other_pods(overlay: str) -> None:
    labels = only(build(SHIPPED / "overlays" / overlay), "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(("overlay", "maker", "template"), PODS)
def test_root_file_systems_are_read_only(overlay: str, maker: str, template: Object) -> None:
    for container in containers(template):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert "/tmp" in mounts or maker == "reknit-redis", f"{container['name']} has no place to write"


@pytest.mark.parametrize(("overlay", "maker", "template"), PODS)
def test_secrets_come_from_a_secret(overlay: str, maker: str, template: Object) -> None:
    for container in containers(template):
        for each in container.get("env", ()):
            if SECRET_WORDS.search(each["name"]):
                assert each["valueFrom"].keys() == {"secretKeyRef"}, each["name"]
            else:
                assert "secretKeyRef" not in each.get("valueFrom", {}), each["name"]
        # a shell expands $NAME itself; the kubelet would put $(NAME) into the arguments, where all can see it
        words = " ".join([*container.get("command", ()), *container.get("args", ())])
        assert not re.search(r"\$\([A-Z]", words)
        assert not re.search(r"--(requirepass|password|token)", words)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_is_among_the_objects_or_in_parameters(overlay: str) -> None:
    objects = build(SHIPPED / "overlays" / overlay)
    assert "Secret" not in {each["kind"] for each in objects}
    spec = cluster_spec(objects)
    assert spec["authOptions"] == {"mode": "token", "secretName": "reknit"}
    assert spec["gcsFaultToleranceOptions"]["redisPassword"].keys() == {"valueFrom"}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert not any(SECRET_WORDS.search(name) for name in group["rayStartParams"])
    for each in objects:
        for text in each.get("data", {}).values() if each["kind"] == "ConfigMap" else ():
            # what a shell calls by name is no secret
            assert not re.search(r"(requirepass|token|password)\s*[=:]?\s*[\"']?[0-9A-Za-z+/]{12,}", text)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_who_answers_knows_the_token_of_clients(overlay: str) -> None:
    objects = build(SHIPPED / "overlays" / overlay)
    knowing = {
        maker
        for maker, template in pod_templates(objects)
        for container in containers(template)
        for each in container.get("env", ())
        if each["name"] == "REKNIT_SERVE_TOKEN"
    }
    assert knowing == ({"head", "reserved", "spot"} if overlay == "serve" else set())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_worker_has_the_time_that_its_drain_takes(overlay: str) -> None:
    spec = cluster_spec(build(SHIPPED / "overlays" / overlay))
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        env = {each["name"]: each.get("value") for each in container["env"]}
        drain = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
        assert drain >= TERM_SECONDS, "Ray ends the worker before it thinks that it has to be gone"
        assert pod["terminationGracePeriodSeconds"] >= drain + KILL_MARGIN
        # `ray stop` before the drain would end what is to be drained
        assert "lifecycle" not in container
        assert pod.get("restartPolicy", "Never") == "Never"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_failure_domain_of_the_code_is_one_of_the_cluster(overlay: str) -> None:
    """The code takes a Ray node for a failure domain; that holds only if no two share a machine."""
    spec = cluster_spec(build(SHIPPED / "overlays" / overlay))
    for group in spec["workerGroupSpecs"]:
        assert group["numOfHosts"] == 1
        pod = group["template"]["spec"]
        labels = group["template"]["metadata"]["labels"]
        (apart,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert apart["topologyKey"] == "kubernetes.io/hostname"
        wanted = apart["labelSelector"]["matchLabels"]
        assert wanted.items() <= labels.items(), "workers of the other group are not kept away"
        assert wanted["app.kubernetes.io/component"] == "worker"
        # Ray's own words for zone and kind of machine
        assert group["labels"].keys() == {ray._raylet.RAY_NODE_MARKET_TYPE_KEY}
        env = {each["name"]: each for each in pod["containers"][0]["env"]}
        zone = env[ray._raylet.NODE_ZONE_ENV]["valueFrom"]["fieldRef"]["fieldPath"]
        assert pod["topologySpreadConstraints"][0]["topologyKey"] in zone


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_must_not_be_lost_keeps_off_spot_machines(overlay: str) -> None:
    objects = build(SHIPPED / "overlays" / overlay)
    spec = cluster_spec(objects)
    ((key, value),) = spec["workerGroupSpecs"][1]["template"]["spec"]["nodeSelector"].items()
    for maker, template in pod_templates(objects):
        if maker not in ("head", "reknit-redis"):
            continue
        terms = template["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert terms == {
            "nodeSelectorTerms": [
                {"matchExpressions": [{"key": key, "operator": "NotIn", "values": [value]}]}
            ]
        }
    tolerated = spec["workerGroupSpecs"][0]["template"]["spec"]["tolerations"]
    assert key not in {each["key"] for each in tolerated}, "reserved workers would go to spot machines"
    assert key in {each["key"] for each in spec["workerGroupSpecs"][1]["template"]["spec"]["tolerations"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_object_store_fits_in_memory_that_is_there(overlay: str) -> None:
    spec = cluster_spec(build(SHIPPED / "overlays" / overlay))
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (memory,) = [v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v["name"] == "shared-memory"]
        store = int(group["rayStartParams"]["object-store-memory"])
        limit = pod["containers"][0]["resources"]["limits"]["memory"]
        assert store < bytes_of(memory) < bytes_of(limit) / 2


def bytes_of(quantity: str) -> int:
    found = re.fullmatch(r"(\d+)(Mi|Gi)", quantity)
    assert found is not None, quantity
    return math.prod((int(found[1]), 1 << (20 if found[2] == "Mi" else 30)))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_autoscaler_may_talk_to_kubernetes_and_only_so_much(overlay: str) -> None:
    objects = build(SHIPPED / "overlays" / overlay)
    allowed = {
        (group, resource, verb)
        for rule in only(objects, "Role")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed == {("", "pods", v) for v in ("get", "list", "watch")} | {
        ("ray.io", "rayclusters", v) for v in ("get", "patch")
    }
    assert [each["name"] for each in only(objects, "RoleBinding")["subjects"]] == ["reknit-head"]
    for maker, template in pod_templates(objects):
        assert template["spec"]["automountServiceAccountToken"] is False, maker
        for container in containers(template):
            mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
            has_token = "/var/run/secrets/kubernetes.io/serviceaccount" in mounts
            assert has_token == (container["name"] == "autoscaler"), container["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_closed_but_for_what_is_named(overlay: str) -> None:
    objects = build(SHIPPED / "overlays" / overlay)
    policies = {e["metadata"]["name"]: e["spec"] for e in objects if e["kind"] == "NetworkPolicy"}
    refuse = policies.pop("reknit-refuse")
    assert refuse["policyTypes"] == ["Ingress", "Egress"]
    assert refuse.keys() == {"podSelector", "policyTypes"}
    for maker, template in pod_templates(objects):
        labels = template["metadata"]["labels"]
        assert refuse["podSelector"]["matchLabels"].items() <= labels.items(), maker
        assert any(_selects(policy["podSelector"], labels) for policy in policies.values()), maker
    for name, policy in policies.items():
        for rule in policy.get("ingress", ()):
            assert rule["from"], name
        for rule in policy.get("egress", ()):
            assert rule.get("to") or rule.get("ports"), name
    outside = {
        name for name, policy in policies.items() for rule in policy.get("egress", ()) if "to" not in rule
    }
    assert outside == {"reknit-head"}
    workers = {
        name
        for name, policy in policies.items()
        if _selects(
            policy["podSelector"],
            {"app.kubernetes.io/part-of": "reknit", "app.kubernetes.io/component": "worker"},
        )
    }
    assert workers == {"reknit-nodes"} | ({"reknit-clients"} if overlay == "serve" else set())


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    named = selector.get("matchLabels", {}).items() <= labels.items()
    return named and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", ())
    )


def test_prometheus_finds_ports_that_there_are() -> None:
    objects = build(SHIPPED / "overlays" / "train")
    monitor = only(objects, "PodMonitor", "reknit")["spec"]
    wanted = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    for maker, template in pod_templates(objects):
        if _selects(monitor["selector"], template["metadata"]["labels"]):
            ports = {
                port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]
            }
            assert wanted <= ports.keys(), maker
            assert f"metrics.port={ports['reknit']}" in (SHIPPED / "base" / "train.sh").read_text()


def test_prometheus_finds_the_service_and_knows_its_token() -> None:
    objects = build(SHIPPED / "overlays" / "serve")
    monitor = only(objects, "PodMonitor", "reknit-serve")["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    found = [
        template
        for _, template in pod_templates(objects)
        if _selects(monitor["selector"], template["metadata"]["labels"])
    ]
    assert len(found) == 2
    for template in found:
        (container,) = template["spec"]["containers"]
        (port,) = [each["containerPort"] for each in container["ports"] if each["name"] == endpoint["port"]]
        (token,) = [each["valueFrom"] for each in container["env"] if each["name"] == "REKNIT_SERVE_TOKEN"]
        assert token["secretKeyRef"] == endpoint["authorization"]["credentials"]
        (rule,) = only(objects, "NetworkPolicy", "reknit-clients")["spec"]["ingress"]
        assert {"port": port} in rule["ports"]
        peers = [each["podSelector"]["matchLabels"] for each in rule["from"] if "podSelector" in each]
        assert peers == [{"app.kubernetes.io/name": "prometheus"}]


# The image.


def stages() -> list[list[str]]:
    text = re.sub(r"\\\n\s*", "", (SHIPPED / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    starts = [index for index, line in enumerate(lines) if line.startswith("FROM ")]
    return [lines[a:b] for a, b in zip([0, *starts], [*starts, len(lines)], strict=True)]


def test_the_image_is_pinned_and_runs_as_the_user_of_the_manifests() -> None:
    arguments, build_stage, final = stages()
    assert re.fullmatch(r"ARG PYTHON=python:3\.11\.\d+-slim-\w+", arguments[0])
    installs = [line for line in build_stage if "pip install" in line]
    assert installs
    assert all("-c constraints.txt" in line for line in installs)
    assert not any("pip install" in line for line in final), "the final image has no need of a builder"
    (user,) = [line.removeprefix("USER ").split(":")[0] for line in final if line.startswith("USER ")]
    spec = cluster_spec(build(SHIPPED / "overlays" / "cluster"))
    users: set[Any] = {
        group["template"]["spec"]["securityContext"]["runAsUser"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    }
    assert users == {int(user)}


def test_the_image_holds_every_room() -> None:
    _, build_stage, _ = stages()
    copied = {line.split()[1] for line in build_stage if line.startswith("COPY ")}
    rooms = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert {each.rstrip("*") for each in rooms["include"]} <= copied
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{each}" for each in copied} <= set(ignored)
