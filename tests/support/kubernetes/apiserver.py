"""A real kube-apiserver with etcd, of its own, as far as it is needed: it knows KubeRay's RayCluster.

The server (see ``build_apiserver.sh``) is older than KubeRay's definition. What it cannot read of it is left
out: rules in CEL, defaults that are empty strings, and the pod templates' own schema.
"""

from __future__ import annotations

import lzma
import ssl
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.dashboard import free_port
from tests.support.kubernetes.certificates import Certificates
from tests.support.kubernetes.containers import Container
from tests.support.kubernetes.objects import Object
from tests.support.kubernetes.rights import roles
from tests.support.manifests import DEFINITIONS
from tests.support.ray_jobs import wait_until

CLUSTERS = "/apis/ray.io/v1/namespaces/default/rayclusters"
DEFINITIONS_PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
RIGHTS_PATH = "/apis/rbac.authorization.k8s.io/v1/namespaces/default"
TEMPLATES = ("template", "submitterPodTemplate")


@contextmanager
def real_server(binaries: Path, certificates: Certificates) -> Iterator[str]:
    """The server's URL. ``binaries`` holds kube-apiserver and etcd; both end with the context."""
    folder = certificates.folder.parent
    port, store, peers = free_port(), free_port(), free_port()
    url, store_url, peers_url = (
        f"https://127.0.0.1:{port}",
        *(f"http://127.0.0.1:{p}" for p in (store, peers)),
    )
    certificate, key = certificates.server
    public, private = certificates.accounts
    commands = {
        "etcd": {
            "name": "only",
            "data-dir": folder / "etcd",
            "listen-client-urls": store_url,
            "advertise-client-urls": store_url,
            "listen-peer-urls": peers_url,
            "initial-advertise-peer-urls": peers_url,
            "initial-cluster": f"only={peers_url}",
        },
        "kube-apiserver": {
            "etcd-servers": store_url,
            "bind-address": "127.0.0.1",
            "advertise-address": "127.0.0.1",
            "secure-port": port,
            "cert-dir": folder / "apiserver",
            "tls-cert-file": certificate,
            "tls-private-key-file": key,
            "client-ca-file": certificates.authority,
            "service-account-key-file": public,
            "service-account-signing-key-file": private,
            "service-account-issuer": "https://kubernetes.default",
            "service-cluster-ip-range": "10.0.0.0/24",
            "authorization-mode": "RBAC",
            # nobody makes the accounts that it would look for
            "disable-admission-plugins": "ServiceAccount",
        },
    }
    with ExitStack() as stack:
        for program, options in commands.items():
            command = [str(binaries / program), *(f"--{name}={value}" for name, value in options.items())]
            stack.callback(Container(command, {"HOME": str(folder)}, folder / f"{program}.log").kill)
        context = ssl.create_default_context(cafile=str(certificates.authority))
        context.load_cert_chain(*certificates.client)
        client = stack.enter_context(httpx.Client(base_url=url, verify=context, trust_env=False))
        wait_until(lambda: _answers(client, "/api/v1/namespaces/default"), "the API server is ready")
        client.post(DEFINITIONS_PATH, json=definition()).raise_for_status()
        for each in roles():
            client.post(f"{RIGHTS_PATH}/{each['kind'].lower()}s", json=each).raise_for_status()
        wait_until(lambda: _answers(client, CLUSTERS), "it knows RayClusters")
        yield url


def _answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).is_success
    except httpx.TransportError:
        return False


def definition() -> Object:
    """KubeRay's definition of a RayCluster as a server of Kubernetes 1.20 can read it."""
    text = lzma.decompress((DEFINITIONS / "rayclusters.yaml.xz").read_bytes())
    made: Object = _readable(yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    return made


def _readable(node: Any) -> Any:
    if isinstance(node, list):
        return [_readable(each) for each in node]
    if not isinstance(node, Mapping):
        return node
    made = {}
    for key, value in node.items():
        if key == "x-kubernetes-validations" or (key == "default" and value == ""):
            continue
        is_template = key in TEMPLATES and isinstance(value, Mapping) and value.get("type") == "object"
        opaque = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        made[key] = opaque if is_template else _readable(value)
    return made
