"""The stand-in for the Kubernetes API, the operator's rules, and containers that are processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.kubernetes.certificates import Certificates, make_certificates
from tests.support.kubernetes.client import Api
from tests.support.kubernetes.containers import Container, environment_of, expanded
from tests.support.kubernetes.kubelet import Kubelet
from tests.support.kubernetes.lab import cluster_manifest
from tests.support.kubernetes.objects import Object
from tests.support.kubernetes.patches import JSON_PATCH, json_patch, merge_patch
from tests.support.kubernetes.ray_operator import due
from tests.support.kubernetes.server import stand_in
from tests.support.ray_jobs import wait_until


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def api(certificates: Certificates) -> Iterator[Api]:
    with stand_in(certificates) as url, Api(url, certificates) as client:
        yield client


def pod(name: str = "one", *, node: str | None = "here", **labels: str) -> Object:
    spec: Object = {"containers": [], **({} if node is None else {"nodeName": node})}
    return {"metadata": {"name": name, "labels": labels}, "spec": spec}


def patched(api: Api, path: str, operations: Any) -> httpx.Response:
    """As Ray's autoscaler patches a RayCluster."""
    return api._client.patch(
        f"/apis/ray.io/v1/namespaces/default/rayclusters/{path}",
        json=operations,
        headers={"Content-Type": JSON_PATCH},
    )


def test_nobody_is_heard_without_a_certificate(api: Api) -> None:
    answer = httpx.get(f"{api.url}/api/v1/namespaces/default/pods", verify=False, trust_env=False)
    assert answer.status_code == 401


def test_the_autoscalers_account_may_do_what_its_role_says_and_no_more(api: Api) -> None:
    api.clusters.create({"metadata": {"name": "c"}, "spec": {"replicas": 0}})
    with Api(api.url, api.certificates, api.certificates.autoscaler) as autoscaler:
        assert autoscaler.clusters.merge("c", {"spec": {"replicas": 1}})["spec"]["replicas"] == 1
        assert autoscaler.pods.all() == []
        for forbidden in (
            lambda: autoscaler.pods.create(pod()),
            lambda: autoscaler.pods.delete("one"),
            lambda: autoscaler.clusters.create({"metadata": {"name": "d"}}),
            lambda: autoscaler.clusters.delete("c"),
        ):
            with pytest.raises(httpx.HTTPStatusError, match="403"):
                forbidden()


def test_objects_are_found_by_label_and_every_change_has_a_version(api: Api) -> None:
    first = api.pods.create(pod("one", app="a"))
    second = api.pods.create(pod("two", app="b"))
    assert [each["metadata"]["name"] for each in api.pods.all(app="b")] == ["two"]
    assert int(second["metadata"]["resourceVersion"]) > int(first["metadata"]["resourceVersion"])
    with pytest.raises(httpx.HTTPStatusError, match="409"):
        api.pods.create(pod("one"))
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        api.pods.read("three")
    named = api.pods.create({"metadata": {"generateName": "four-"}, "spec": {}})
    assert named["metadata"]["name"].startswith("four-")


def test_the_status_has_a_way_of_its_own(api: Api) -> None:
    created = api.pods.create({**pod(), "status": {"phase": "Running"}})
    assert created["status"]["phase"] == "Pending"
    assert api.pods.merge("one", {"status": {"phase": "Running"}})["status"]["phase"] == "Pending"
    changed = api.pods.set_status("one", {"phase": "Running"})
    assert changed["status"]["phase"] == "Running" and changed["spec"] == created["spec"]


def test_a_stale_change_is_refused(api: Api) -> None:
    created = api.pods.create(pod())
    api.pods.set_status("one", {"phase": "Running"})
    stale = {"metadata": {"resourceVersion": created["metadata"]["resourceVersion"], "labels": {"a": "b"}}}
    with pytest.raises(httpx.HTTPStatusError, match="409"):
        api.pods.merge("one", stale)


def test_a_cluster_is_scaled_by_json_patch_and_all_or_nothing(api: Api) -> None:
    groups = [{"groupName": "spot", "replicas": 0, "scaleStrategy": {}}]
    api.clusters.create({"metadata": {"name": "c"}, "spec": {"workerGroupSpecs": groups}})
    replicas = {"op": "replace", "path": "/spec/workerGroupSpecs/0/replicas", "value": 2}
    assert patched(api, "c", [replicas]).status_code == 200
    assert api.clusters.read("c")["spec"]["workerGroupSpecs"][0]["replicas"] == 2
    nowhere = {"op": "replace", "path": "/spec/workerGroupSpecs/1/replicas", "value": 3}
    assert patched(api, "c", [{**replicas, "value": 5}, nowhere]).status_code == 422
    assert api.clusters.read("c")["spec"]["workerGroupSpecs"][0]["replicas"] == 2


def test_a_pod_on_a_node_stays_until_its_kubelet_lets_go(api: Api) -> None:
    api.pods.create({**pod(), "spec": {"nodeName": "here", "terminationGracePeriodSeconds": 7}})
    api.pods.delete("one")
    leaving = api.pods.read("one")["metadata"]
    assert leaving["deletionGracePeriodSeconds"] == 7 and "deletionTimestamp" in leaving
    api.pods.delete("one", grace=0)
    assert api.pods.all() == []
    api.pods.create(pod("two", node=None))
    api.pods.delete("two")
    assert api.pods.all() == []
    api.pods.delete("two")  # gone already


@pytest.mark.parametrize(
    ("operation", "made"),
    [
        ({"op": "add", "path": "/a/-", "value": 3}, {"a": [1, 2, 3], "b/c": 4}),
        ({"op": "add", "path": "/a/0", "value": 0}, {"a": [0, 1, 2], "b/c": 4}),
        ({"op": "remove", "path": "/a/0"}, {"a": [2], "b/c": 4}),
        ({"op": "replace", "path": "/b~1c", "value": 5}, {"a": [1, 2], "b/c": 5}),
        ({"op": "test", "path": "/a/1", "value": 2}, {"a": [1, 2], "b/c": 4}),
    ],
)
def test_json_patch(operation: Object, made: Object) -> None:
    before = {"a": [1, 2], "b/c": 4}
    assert json_patch(before, [operation]) == made
    assert before == {"a": [1, 2], "b/c": 4}


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "replace", "path": "/x", "value": 1},
        {"op": "remove", "path": "/a/2"},
        {"op": "replace", "path": "/a/-1", "value": 1},
        {"op": "add", "path": "/a/3", "value": 1},
        {"op": "test", "path": "/a/1", "value": 3},
        {"op": "add", "path": "/x/y", "value": 1},
    ],
)
def test_a_json_patch_that_does_not_apply(operation: Object) -> None:
    with pytest.raises(ValueError, match=operation["path"] if operation["op"] != "test" else "test failed"):
        json_patch({"a": [1, 2]}, [operation])


def test_merge_patch() -> None:
    """RFC 7386's own example."""
    before = {"title": "G", "author": {"given": "J", "family": "D"}, "tags": ["a", "b"], "content": "x"}
    patch = {"title": "H", "phone": "1", "author": {"family": None}, "tags": ["a"]}
    assert merge_patch(before, patch) == {
        **{"title": "H", "author": {"given": "J"}, "tags": ["a"], "content": "x", "phone": "1"}
    }


def worker(name: str, group: str, phase: str = "Running", *, leaving: bool = False) -> Object:
    labels = {"ray.io/node-type": "worker", "ray.io/group": group}
    deletion = {"deletionTimestamp": "2026-01-01T00:00:00Z"} if leaving else {}
    return {"metadata": {"name": name, "labels": labels, **deletion}, "status": {"phase": phase}}


HEAD = {
    "metadata": {"name": "h", "labels": {"ray.io/node-type": "head", "ray.io/group": "headgroup"}},
    "status": {"phase": "Running", "podIP": "192.0.2.9"},
}


def test_first_the_head_then_the_workers_that_are_missing() -> None:
    cluster = cluster_manifest(reserved=1, spot=2)
    (head,) = due(cluster, [], "here").create
    assert [c["name"] for c in head["spec"]["containers"]] == ["ray-head", "autoscaler"]
    assert not due(cluster, [{**HEAD, "status": {"phase": "Pending"}}], "here").create
    (made,) = due(cluster, [HEAD], "here").create
    assert made["metadata"]["labels"]["ray.io/group"] == "reserved"
    port = cluster["spec"]["headGroupSpec"]["rayStartParams"]["port"]
    (container,) = made["spec"]["containers"]
    assert f"--address=192.0.2.9:{port}" in container["command"]
    assert "--labels=ray.io/market-type=on-demand" in container["command"]


def test_failed_and_named_pods_go_and_no_other_ever() -> None:
    cluster = cluster_manifest(reserved=1, spot=3)
    spot = cluster["spec"]["workerGroupSpecs"][1]
    spot.update(replicas=1, scaleStrategy={"workersToDelete": ["b"]})
    pods = [HEAD, worker("r", "reserved"), worker("a", "spot"), worker("b", "spot")]
    assert due(cluster, pods, "here").delete == ("b",) and not due(cluster, pods, "here").create
    spot.update(replicas=0, scaleStrategy={"workersToDelete": []})
    assert due(cluster, pods, "here").delete == ()
    spot["replicas"] = 2
    pods = [HEAD, worker("r", "reserved"), worker("a", "spot", "Failed"), worker("b", "spot", leaving=True)]
    deeds = due(cluster, pods, "here")
    assert deeds.delete == ("a",) and len(deeds.create) == 1, "who is on the way out counts until it is gone"
    spot["replicas"] = 9
    assert len(due(cluster, pods, "here").create) == 2, "no more than maxReplicas"


IGNORES = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(99)"
)
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {IGNORES!r}]).wait()"


def test_a_kubelet_runs_a_pod_and_sees_it_off(api: Api, tmp_path: Path) -> None:
    """SIGTERM, the grace period, SIGKILL; a pod that ends by itself has failed."""
    commands = {"stubborn": IGNORES, "brief": "import sys; sys.exit(3)"}
    for name, program in commands.items():
        container = {"name": "main", "image": "process", "command": [sys.executable, "-c", program]}
        api.pods.create({**pod(name), "spec": {"nodeName": "here", "containers": [container]}})
    with Kubelet(api, "here", "192.0.2.9", tmp_path, {}) as kubelet:
        kubelet.sync()
        assert api.pods.read("stubborn")["status"]["podIP"] == "192.0.2.9"
        wait_until(lambda: (tmp_path / "stubborn.main.log").read_text() == "1\n", "it ignores SIGTERM")
        (container,) = kubelet._running["stubborn"].containers.values()

        def failed() -> bool:
            kubelet.sync()
            return bool(api.pods.read("brief")["status"]["phase"] == "Failed")

        wait_until(failed, "the brief one's end is seen")
        (status,) = api.pods.read("brief")["status"]["containerStatuses"]
        assert status["state"]["terminated"]["exitCode"] == 3
        assert api.pods.read("stubborn")["status"]["phase"] == "Running"
        api._client.delete(
            "/api/v1/namespaces/default/pods/stubborn", params={"gracePeriodSeconds": 1}
        ).raise_for_status()
        kubelet.sync()
        assert container.exit_code is None, "it has its grace period"

        def gone() -> bool:
            kubelet.sync()
            return [each["metadata"]["name"] for each in api.pods.all()] == ["brief"]

        wait_until(gone, "the pod is gone")
        assert container.exit_code == 128 + 9 and not container.processes()


def test_what_a_container_is_told(tmp_path: Path) -> None:
    about = {"metadata": {"name": "p", "namespace": "n", "labels": {"ray.io/group": "spot"}}}
    fields = {
        "NAME": "metadata.name",
        "GROUP": "metadata.labels['ray.io/group']",
        "AT": "status.podIP",
        "SPACE": "metadata.namespace",
    }
    env = [{"name": n, "valueFrom": {"fieldRef": {"fieldPath": path}}} for n, path in fields.items()]
    told = environment_of(about, {"env": [*env, {"name": "X", "value": "1"}]}, "192.0.2.9")
    assert told == {"NAME": "p", "GROUP": "spot", "AT": "192.0.2.9", "SPACE": "n", "X": "1"}
    assert expanded(["$(NAME)-$(X)", "$(NONE)"], told) == ["p-1", "$(NONE)"]


def test_killing_a_container_leaves_no_process_of_it(tmp_path: Path) -> None:
    container = Container([sys.executable, "-c", PARENT], {}, tmp_path / "log")
    wait_until(lambda: (tmp_path / "log").read_text() == "1\n", "its child runs")
    assert len(container.processes()) == 2
    container.kill()
    assert not container.processes() and container.exit_code == 128 + 9
