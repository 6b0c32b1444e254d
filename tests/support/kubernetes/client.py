"""A client of the Kubernetes API, real or stand-in: the few calls that the helpers here make."""

from __future__ import annotations

import json
import ssl
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from tests.support.kubernetes.certificates import Certificates
from tests.support.kubernetes.objects import Object
from tests.support.kubernetes.patches import MERGE_PATCH

PODS = "/api/v1/namespaces/{namespace}/pods"
CLUSTERS = "/apis/ray.io/v1/namespaces/{namespace}/rayclusters"


class Api:
    """Calls raise ``httpx.HTTPStatusError`` where the server refuses. For any thread.

    ``own``: certificate and key of who calls, by default of somebody who may do anything.
    """

    def __init__(
        self,
        url: str,
        certificates: Certificates,
        own: tuple[Path, Path] | None = None,
        namespace: str = "default",
    ) -> None:
        context = ssl.create_default_context(cafile=str(certificates.authority))
        context.load_cert_chain(*(own or certificates.client))
        self.url, self.certificates, self.namespace = url, certificates, namespace
        # whatever the environment says of proxies and authorities is not meant for this server
        self._client = httpx.Client(base_url=url, verify=context, trust_env=False, timeout=30.0)
        self.pods = Resource(self._client, PODS.format(namespace=namespace))
        self.clusters = Resource(self._client, CLUSTERS.format(namespace=namespace))

    def __enter__(self) -> Api:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()


class Resource:
    """One kind of object in one namespace."""

    def __init__(self, client: httpx.Client, path: str) -> None:
        self._client, self._path = client, path

    def all(self, **labels: str) -> list[Object]:
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        return list(self._call("GET", "", params={"labelSelector": selector} if selector else {})["items"])

    def of(self, cluster: str) -> list[Object]:
        """Those that belong to a RayCluster."""
        return self.all(**{"ray.io/cluster": cluster})

    def read(self, name: str) -> Object:
        return self._call("GET", f"/{name}")

    def create(self, body: Object) -> Object:
        return self._call("POST", "", json=body)

    def merge(self, name: str, patch: Object) -> Object:
        return self._patch(f"/{name}", patch)

    def set_status(self, name: str, status: Object) -> Object:
        return self._patch(f"/{name}/status", {"status": status})

    def delete(self, name: str, grace: int | None = None) -> None:
        """Who is gone already is gone."""
        params = {} if grace is None else {"gracePeriodSeconds": grace}
        answer = self._client.delete(f"{self._path}/{name}", params=params)
        if answer.status_code != 404:
            answer.raise_for_status()

    def _patch(self, path: str, patch: Object) -> Object:
        return self._call("PATCH", path, content=json.dumps(patch), headers={"Content-Type": MERGE_PATCH})

    def _call(self, method: str, path: str, **arguments: Any) -> Object:
        answer = self._client.request(method, self._path + path, **arguments)
        if answer.is_error:
            said = f"{method} {answer.url}: {answer.status_code} {answer.text}"
            raise httpx.HTTPStatusError(said, request=answer.request, response=answer)
        made: Object = answer.json()
        return made
