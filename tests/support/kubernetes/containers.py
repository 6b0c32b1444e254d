"""Containers that are nothing but processes of this machine."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.kubernetes.objects import Object
from tests.support.ray_jobs import TOKEN, descendants

LABEL = re.compile(r"metadata\.labels\['([^']+)'\]")
REFERENCE = re.compile(r"\$\((\w+)\)")


class Container:
    """A process with everything that came from it; what it prints goes to ``log``.

    Processes are known by a token in their environment: one whose parent has died belongs to it still.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._token = secrets.token_hex(8)
        with log.open("wb") as printed:
            self._process = subprocess.Popen(
                command,
                env={**environment, TOKEN: self._token},
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """None while its first process lives; 128 and the signal's number where one ended it."""
        code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code

    def processes(self) -> list[int]:
        """Its living processes."""
        return descendants(self._token)

    def terminate(self) -> None:
        """SIGTERM to the first process, as a kubelet sends it."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to all of its processes. Returns when the first one is gone."""
        while found := self.processes():  # until none was started while these were looked for
            for process in found:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._process.poll()
        self._process.wait()


def environment_of(pod: Object, container: Object, address: str) -> dict[str, str]:
    """What the container's ``env`` comes to: values, and references to the pod's own fields."""
    return {
        each["name"]: str(each["value"]) if "value" in each else _field(pod, each["valueFrom"], address)
        for each in container.get("env", ())
    }


def _field(pod: Object, source: Mapping[str, Any], address: str) -> str:
    path: str = source["fieldRef"]["fieldPath"]
    label = LABEL.fullmatch(path)
    if label is not None:
        return str(pod["metadata"]["labels"].get(label[1], ""))
    fields = {
        "metadata.name": pod["metadata"]["name"],
        "metadata.namespace": pod["metadata"]["namespace"],
        "status.podIP": address,
    }
    return str(fields[path])


def expanded(command: list[str], environment: Mapping[str, str]) -> list[str]:
    """``$(NAME)`` as Kubernetes replaces it; an unknown one stays."""
    return [REFERENCE.sub(lambda found: environment.get(found[1], found[0]), part) for part in command]
