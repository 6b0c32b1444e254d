"""A RayCluster with Ray's real autoscaler: an API server, an operator, a kubelet, and processes for pods."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

from tests.support.dashboard import free_port
from tests.support.kubernetes.certificates import Certificates, make_certificates
from tests.support.kubernetes.client import Api
from tests.support.kubernetes.kubelet import Kubelet
from tests.support.kubernetes.loop import Loop
from tests.support.kubernetes.objects import Object
from tests.support.kubernetes.ray_operator import RayOperator
from tests.support.manifests import ROOT, SHIPPED
from tests.support.ray_jobs import wait_until

NODE = "this-machine"
IDLE_SECONDS = 3
CLUSTER = "reknit"
OBJECT_STORE_BYTES = 100_000_000

ApiServer = Callable[[Certificates], AbstractContextManager[str]]
"""An API server that shows its certificate and knows the clients'; the context is its URL."""


@dataclass
class Lab:
    """``address`` is that of Ray's head; ``folder`` has what every container printed."""

    api: Api
    kubelet: Kubelet
    address: str
    folder: Path

    def pods(self) -> dict[str, str]:
        """The worker pods that are running and are to stay, by name, with their groups."""
        return {
            pod["metadata"]["name"]: pod["metadata"]["labels"]["ray.io/group"]
            for pod in self.api.pods.of(CLUSTER)
            if pod["metadata"]["labels"]["ray.io/node-type"] == "worker"
            and pod["status"].get("phase") == "Running"
            and "deletionTimestamp" not in pod["metadata"]
        }


@contextmanager
def ray_on_kubernetes(api_server: ApiServer, reserved: int, spot: int) -> Iterator[Lab]:
    """This process is connected to the Ray cluster meanwhile. At its end nothing that was started is left.

    ``reserved`` pods are always there, up to ``spot`` more come and go, each with room for one worker.
    """
    with ExitStack() as stack:
        # short, because Ray puts sockets there, whose paths may have no more than 107 characters
        folder = Path(tempfile.mkdtemp(prefix="k8s-", dir="/tmp"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        certificates = make_certificates(folder / "pki")
        url = stack.enter_context(api_server(certificates))
        api = stack.enter_context(Api(url, certificates))
        address = ray.util.get_node_ip_address()
        manifest = cluster_manifest(reserved, spot)
        kubelet = stack.enter_context(Kubelet(api, NODE, address, folder, environment(api)))
        stack.enter_context(Loop("operator", RayOperator(api, NODE).reconcile))
        stack.enter_context(Loop("kubelet", kubelet.sync))
        api.clusters.create(manifest)
        head = f"{address}:{manifest['spec']['headGroupSpec']['rayStartParams']['port']}"
        wait_until(lambda: _accepts(head), "Ray's head answers")
        ray.init(address=head, logging_level="ERROR", log_to_driver=False)
        stack.callback(ray.shutdown)
        yield Lab(api, kubelet, head, folder)


def cluster_manifest(reserved: int, spot: int) -> Object:
    """The RayCluster of ``k8s/base``, with sizes, and without what a process has no use for (images, volumes,
    accounts). Surplus pods go after ``IDLE_SECONDS``."""
    cluster: Object = yaml.safe_load((SHIPPED / "base" / "raycluster.yaml").read_text(encoding="utf-8"))
    cluster["metadata"]["name"] = CLUSTER
    spec = cluster["spec"]
    for container_wide in ("authOptions", "gcsFaultToleranceOptions"):
        del spec[container_wide]
    every_second = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "AUTOSCALER_METRIC_PORT": str(free_port())}
    spec["autoscalerOptions"] = {
        **{key: spec["autoscalerOptions"][key] for key in ("version", "upscalingMode")},
        "idleTimeoutSeconds": IDLE_SECONDS,
        "env": [{"name": name, "value": value} for name, value in every_second.items()],
    }
    shared = {
        "temp-dir": "$(SCRATCH)",  # two raylets that start at once in one folder mistake each other's files
        "object-store-memory": str(OBJECT_STORE_BYTES),
        "include-log-monitor": "false",  # it passes on what workers print, which nobody asks for
        # for those that choose their port themselves a raylet waits, and gives up where the machine is busy
        "dashboard-agent-listen-port": "$(PORT_1)",
        "metrics-export-port": "$(PORT_2)",
        "runtime-env-agent-port": "$(PORT_3)",
        "dashboard-agent-grpc-port": "$(PORT_4)",
    }
    head = spec["headGroupSpec"]
    head["rayStartParams"] = {
        "num-cpus": head["rayStartParams"]["num-cpus"],
        "port": str(free_port()),
        "ray-client-server-port": str(free_port()),
        "include-dashboard": "false",
        **shared,
    }
    head["template"] = _as_process(head["template"])
    sizes = {"reserved": (reserved, reserved), "spot": (0, spot)}
    for group in spec["workerGroupSpecs"]:
        least, most = sizes[group["groupName"]]
        group.update(replicas=least, minReplicas=least, maxReplicas=most, idleTimeoutSeconds=IDLE_SECONDS)
        group["rayStartParams"] = {"num-cpus": "1", **shared}
        group["template"] = _as_process(group["template"])
    return cluster


def _as_process(template: Object) -> Object:
    spec = template["spec"]
    (container,) = spec["containers"]
    kept: dict[str, Any] = {"name": container["name"], "image": "process"}
    kept["env"] = [each for each in container["env"] if each["name"].startswith("RAY_") and "value" in each]
    grace = spec["terminationGracePeriodSeconds"]
    return {"spec": {"containers": [kept], "terminationGracePeriodSeconds": grace}}


def environment(api: Api) -> dict[str, str]:
    """What containers find: this checkout for an image, the API server, and the head's account there."""
    certificate, key = api.certificates.autoscaler
    port = api.url.rpartition(":")[2]
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT_HTTPS": port,
        "RAY_KUBERAY_CLIENT_CERT_PATH": str(certificate),
        "RAY_KUBERAY_CLIENT_KEY_PATH": str(key),
        "RAY_KUBERAY_CA_CERT_PATH": str(api.certificates.authority),
        # it would take precedence over the authority that the autoscaler is told of
        "REQUESTS_CA_BUNDLE": "",
        "CURL_CA_BUNDLE": "",
    }


def _accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, int(port))) == 0
