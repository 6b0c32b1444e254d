"""A stand-in for the Kubernetes API server: pods and RayClusters over HTTPS, for those with a certificate."""

from __future__ import annotations

import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.kubernetes.certificates import Certificates
from tests.support.kubernetes.objects import Objects, Refused
from tests.support.kubernetes.rights import ANYTHING, permitted, rules_of

PATH = re.compile(
    r"(?P<group>/api/v1|/apis/ray\.io/v1)/namespaces/(?P<namespace>[^/]+)/(?P<resource>pods|rayclusters)"
    r"(?:/(?P<name>[^/]+)(?P<status>/status)?)?"
)
GROUPS = {"pods": "/api/v1", "rayclusters": "/apis/ray.io/v1"}
API_GROUPS = {"pods": "", "rayclusters": "ray.io"}
VERBS = {"GET": "get", "POST": "create", "PATCH": "patch", "DELETE": "delete"}
LISTS = {"pods": ("v1", "PodList"), "rayclusters": ("ray.io/v1", "RayClusterList")}


@contextmanager
def stand_in(certificates: Certificates) -> Iterator[str]:
    """The server's URL."""

    class Handler(_Handler):
        objects = Objects()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates.server)
    context.load_verify_locations(certificates.authority)
    context.verify_mode = ssl.CERT_OPTIONAL  # who has none is told so
    # the handshake is the connection's own thread's business, or one slow caller would hold up all
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    objects: Objects

    def _answer(self) -> None:
        try:
            code, answer = self._carried_out(self._user())
        except Refused as refused:
            code = refused.code
            answer = {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "reason": refused.reason,
                "message": refused.message,
                "code": code,
            }
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _user(self) -> tuple[str, str]:
        """Name and group, as the certificate has them."""
        certificate = getattr(self.connection, "getpeercert", dict)()
        if not certificate:
            raise Refused(401, "Unauthorized", "Unauthorized")
        subject = dict(field for part in certificate["subject"] for field in part)
        return subject["commonName"], subject.get("organizationName", "")

    do_GET = do_POST = do_PATCH = do_DELETE = _answer

    def _carried_out(self, user: tuple[str, str]) -> tuple[int, Any]:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        asked = parse_qs(address.query)
        found = PATH.fullmatch(address.path)
        if found is None or GROUPS[found["resource"]] != found["group"]:
            raise Refused(404, "NotFound", f"{address.path} is not known")
        resource, namespace, name = found["resource"], found["namespace"], found["name"]
        verb = "list" if self.command == "GET" and name is None else VERBS[self.command]
        if user[1] != ANYTHING and not permitted(rules_of(user[0]), API_GROUPS[resource], resource, verb):
            raise Refused(403, "Forbidden", f"{user[0]} cannot {verb} {resource}")
        try:
            body = json.loads(content) if content else {}
        except ValueError as error:
            raise Refused(400, "BadRequest", str(error)) from None
        match self.command:
            case "GET" if name is None:
                items, version = self.objects.list(resource, namespace, asked.get("labelSelector", [""])[0])
                api_version, kind = LISTS[resource]
                metadata = {"resourceVersion": version}
                return 200, {"kind": kind, "apiVersion": api_version, "metadata": metadata, "items": items}
            case "GET":
                return 200, self.objects.read(resource, namespace, name)
            case "POST" if name is None:
                return 201, self.objects.create(resource, namespace, body)
            case "PATCH" if name is not None:
                kind = self.headers.get("Content-Type", "").partition(";")[0]
                status = found["status"] is not None
                return 200, self.objects.patch(resource, namespace, name, body, kind, status=status)
            case "DELETE" if name is not None:
                grace = asked.get("gracePeriodSeconds", [body.get("gracePeriodSeconds")])[0]
                seconds = None if grace is None else int(grace)
                return 200, self.objects.delete(resource, namespace, name, seconds)
        raise Refused(405, "MethodNotAllowed", f"{self.command} {address.path}")

    def log_message(self, *_: object) -> None:
        pass
