"""What kubectl asks of a server before it believes that an object can be created: which kinds there are."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KINDS: dict[str, tuple[tuple[str, str, bool], ...]] = {
    "v1": (
        ("ConfigMap", "configmaps", True),
        ("Namespace", "namespaces", False),
        ("PersistentVolumeClaim", "persistentvolumeclaims", True),
        ("Service", "services", True),
        ("ServiceAccount", "serviceaccounts", True),
    ),
    "apps/v1": (("StatefulSet", "statefulsets", True),),
    "networking.k8s.io/v1": (("NetworkPolicy", "networkpolicies", True),),
    "rbac.authorization.k8s.io/v1": (("Role", "roles", True), ("RoleBinding", "rolebindings", True)),
    "scheduling.k8s.io/v1": (("PriorityClass", "priorityclasses", False),),
    "ray.io/v1": (
        ("RayCluster", "rayclusters", True),
        ("RayJob", "rayjobs", True),
        ("RayService", "rayservices", True),
    ),
    "monitoring.coreos.com/v1": (
        ("PodMonitor", "podmonitors", True),
        ("PrometheusRule", "prometheusrules", True),
    ),
}
"""By API version: kind, its name in paths, whether it lives in a namespace."""


def _resources(version: str) -> dict[str, Any]:
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": version,
        "resources": [
            {"name": path, "singularName": "", "namespaced": inside, "kind": kind, "verbs": ["create", "get"]}
            for kind, path, inside in KINDS[version]
        ],
    }


def _answers() -> dict[str, Any]:
    groups = []
    answers = {
        "/version": {"major": "1", "minor": "32", "gitVersion": "v1.32.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/api/v1": _resources("v1"),
    }
    for version in KINDS:
        group, _, number = version.rpartition("/")
        if group:
            entry = {"groupVersion": version, "version": number}
            groups.append({"name": group, "versions": [entry], "preferredVersion": entry})
            answers[f"/apis/{version}"] = _resources(version)
    answers["/apis"] = {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    return answers


@contextmanager
def discovery() -> Iterator[str]:
    """A server's URL. It knows kinds and nothing else: whoever creates something there is refused."""
    answers = _answers()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.get(self.path.partition("?")[0])
            body = json.dumps(answer or {"kind": "Status", "status": "Failure", "code": 404}).encode()
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
