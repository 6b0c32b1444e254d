"""What a Kubernetes API server keeps, as far as Ray's autoscaler and the helpers here ask for it."""

from __future__ import annotations

import copy
import datetime
import threading
import uuid
from collections.abc import Mapping
from typing import Any

from tests.support.kubernetes.patches import JSON_PATCH, MERGE_PATCH, json_patch, merge_patch

Object = dict[str, Any]

DEFAULT_GRACE_SECONDS = 30


class Refused(Exception):
    """``code`` is the HTTP status, ``reason`` Kubernetes' word for it."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message


class Objects:
    """Objects by (resource, namespace, name). Every change has a ``resourceVersion`` of its own. What callers
    get is theirs to keep. For any thread."""

    def __init__(self) -> None:
        self._objects: dict[tuple[str, str, str], Object] = {}
        self._version = 0
        self._lock = threading.Lock()

    def create(self, resource: str, namespace: str, body: Object) -> Object:
        """``status`` is dropped: it has a way of its own. Raises Refused."""
        made = {key: copy.deepcopy(value) for key, value in body.items() if key != "status"}
        metadata = made.setdefault("metadata", {})
        with self._lock:
            name = metadata.get("name") or f"{metadata['generateName']}{uuid.uuid4().hex[:5]}"
            if (resource, namespace, name) in self._objects:
                raise Refused(409, "AlreadyExists", f'{resource} "{name}" already exists')
            metadata.update(name=name, namespace=namespace, uid=str(uuid.uuid4()), creationTimestamp=_now())
            made["status"] = {"phase": "Pending"} if resource == "pods" else {}
            return self._keep(resource, namespace, name, made)

    def read(self, resource: str, namespace: str, name: str) -> Object:
        """Raises Refused."""
        with self._lock:
            return copy.deepcopy(self._found(resource, namespace, name))

    def list(self, resource: str, namespace: str, selector: str = "") -> tuple[list[Object], str]:
        """Those whose labels fit ``selector`` (``key=value``, joined by commas), and the newest version."""
        wanted = dict(part.split("=", 1) for part in selector.split(",") if part)
        with self._lock:
            found = [
                copy.deepcopy(kept)
                for (kind, place, _), kept in sorted(self._objects.items())
                if (kind, place) == (resource, namespace)
                and wanted.items() <= kept["metadata"].get("labels", {}).items()
            ]
            return found, str(self._version)

    def patch(
        self, resource: str, namespace: str, name: str, patch: Any, kind: str, *, status: bool = False
    ) -> Object:
        """With ``status`` nothing but the status changes, without it everything else.

        Raises Refused: 409 where the patch names an older ``resourceVersion``, 422 where it does not apply.
        """
        with self._lock:
            before = self._found(resource, namespace, name)
            if isinstance(patch, Mapping):
                version = patch.get("metadata", {}).get("resourceVersion")
                if version not in (None, before["metadata"]["resourceVersion"]):
                    raise Refused(409, "Conflict", f'{resource} "{name}" has been modified')
            try:
                if kind == JSON_PATCH:
                    after = json_patch(before, patch)
                elif kind == MERGE_PATCH:
                    after = merge_patch(before, patch)
                else:
                    raise Refused(415, "UnsupportedMediaType", f"{kind} is not supported")
            except ValueError as error:
                raise Refused(422, "Invalid", str(error)) from None
            kept = {**before, "status": after.get("status", {})} if status else after
            if not status:
                kept["status"] = before["status"]
            if kept == before:
                return copy.deepcopy(before)
            return self._keep(resource, namespace, name, copy.deepcopy(kept))

    def delete(self, resource: str, namespace: str, name: str, grace: int | None) -> Object:
        """A pod that is on a node, and not over, stays with a ``deletionTimestamp`` until its kubelet deletes
        it with a grace period of zero seconds. Raises Refused."""
        with self._lock:
            found = self._found(resource, namespace, name)
            spec = found.get("spec", {})
            if grace is None:
                grace = spec.get("terminationGracePeriodSeconds", DEFAULT_GRACE_SECONDS)
            over = found.get("status", {}).get("phase") in ("Failed", "Succeeded")
            if resource != "pods" or not spec.get("nodeName") or over or grace == 0:
                del self._objects[resource, namespace, name]
                self._version += 1
                return {"kind": "Status", "apiVersion": "v1", "status": "Success"}
            if "deletionTimestamp" in found["metadata"]:
                return copy.deepcopy(found)
            leaving = copy.deepcopy(found)
            leaving["metadata"].update(deletionTimestamp=_now(), deletionGracePeriodSeconds=grace)
            return self._keep(resource, namespace, name, leaving)

    def _found(self, resource: str, namespace: str, name: str) -> Object:
        found = self._objects.get((resource, namespace, name))
        if found is None:
            raise Refused(404, "NotFound", f'{resource} "{name}" not found')
        return found

    def _keep(self, resource: str, namespace: str, name: str, made: Object) -> Object:
        self._version += 1
        made["metadata"]["resourceVersion"] = str(self._version)
        self._objects[resource, namespace, name] = made
        return copy.deepcopy(made)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
