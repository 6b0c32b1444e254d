"""Real TCP links between the endpoints of one process, through proxies that can be cut and mended.

What is cut is a direction, as a firewall or a broken switch does it: packets from one endpoint to another are
held back, and delivered when the wire is mended, as TCP's retransmission would. Data in the other direction
flows on until the sender has a window's worth of bytes for which no acknowledgement came.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from runtime.fabric.interface import ControlCallback, LostCallback
from runtime.fabric.sockets import SocketEndpoint
from runtime.plan import WorkerId
from tests.support.chaos import ChaosRun

WINDOW = 14_600
"""Bytes that TCP sends at first without an acknowledgement: ten segments (RFC 6928)."""

Way = tuple[WorkerId, WorkerId]
"""From whom to whom packets go."""

T = TypeVar("T")


class Wires:
    """A proxy for each ordered pair of endpoints. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._cut: set[Way] = set()
        self._silent: set[Way] = set()
        self._changed = asyncio.Event()
        self._proxies: dict[tuple[WorkerId, WorkerId, str], str] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wires", daemon=True)
        self._thread.start()

    def via(self, source: WorkerId, target: WorkerId, address: str) -> str:
        """Where ``source`` dials to reach ``target``, which listens at ``address``."""
        with self._lock:
            key = (source, target, address)
            if key not in self._proxies:
                self._proxies[key] = self._do(self._serve(source, target, address))
            return self._proxies[key]

    def cut(self, ways: Iterable[Way]) -> None:
        self._do(self._set(self._cut | set(ways)))

    def silence(self, ways: Iterable[Way]) -> None:
        """Swallows what is sent on the connections that the first of each pair dialled, and only there, as a
        firewall does that has forgotten them."""
        self._do(self._set(self._cut, self._silent | set(ways)))

    def mend(self) -> None:
        """All of them."""
        self._do(self._set(set()))

    def close(self) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    # In the loop's thread.

    async def _set(self, cut: set[Way], silent: Iterable[Way] = ()) -> None:
        self._cut, self._silent = cut, set(silent)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _serve(self, source: WorkerId, target: WorkerId, address: str) -> str:
        host, _, port = address.rpartition(":")

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await self._passes((source, target), 0, dialled=True)
                there, back = await asyncio.open_connection(host, int(port))
            except OSError:
                writer.close()
                return
            await asyncio.gather(
                self._pump(reader, back, (source, target), dialled=True),
                self._pump(there, writer, (target, source)),
            )

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _passes(self, way: Way, unacknowledged: int, dialled: bool = False) -> None:
        """Waits until packets get through."""
        while (
            way in self._cut
            or (dialled and way in self._silent)
            or (way[::-1] in self._cut and unacknowledged > WINDOW)
        ):
            await self._changed.wait()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way, dialled: bool = False
    ) -> None:
        unacknowledged = 0
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                unacknowledged = unacknowledged + len(data) if way[::-1] in self._cut else 0
                await self._passes(way, unacknowledged, dialled)
                writer.write(data)
                await writer.drain()
        await self._passes(way, 0, dialled)  # the end of a connection is a packet too
        writer.close()

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class WiredEndpoint(SocketEndpoint):
    """Dials its peers through the wires."""

    def __init__(
        self,
        wires: Wires,
        worker: WorkerId,
        secret: bytes,
        on_control: ControlCallback,
        on_lost: LostCallback,
    ) -> None:
        self._wires = wires
        super().__init__(worker, secret, on_control=on_control, on_lost=on_lost)

    def connect(self, addresses: Mapping[WorkerId, str]) -> None:
        super().connect(
            {peer: self._wires.via(self.worker, peer, address) for peer, address in addresses.items()}
        )


class WiredFabric:
    """Stands in for ``InProcessFabric``: the same workers, over real sockets."""

    def __init__(self) -> None:
        self.wires = Wires()
        self.endpoints: dict[WorkerId, WiredEndpoint] = {}
        self._secret = secrets.token_bytes(32)

    def endpoint(
        self, worker: WorkerId, *, on_control: ControlCallback, on_lost: LostCallback
    ) -> WiredEndpoint:
        assert worker not in self.endpoints, f"worker {worker} was here before"
        endpoint = WiredEndpoint(self.wires, worker, self._secret, on_control=on_control, on_lost=on_lost)
        self.endpoints[worker] = endpoint
        return endpoint

    def kill(self, worker: WorkerId, reason: str = "died") -> None:
        """Closes its sockets, as the kernel does for a killed process."""
        self.endpoints[worker].close()

    def close(self) -> None:
        for endpoint in list(self.endpoints.values()):
            endpoint.close()
        self.wires.close()


class WiredRun(ChaosRun):
    """A run over wires. Nobody can end a worker that is ``unreachable`` from where the controller is."""

    def __post_init__(self) -> None:
        self.unreachable: set[WorkerId] = set()
        super().__post_init__()

    def _make_fabric(self) -> Any:
        return WiredFabric()

    @property
    def wires(self) -> Wires:
        wires: Wires = self.fabric.wires
        return wires

    def _worker(self, number: int) -> Any:
        worker = super()._worker(number)
        worker.endpoint.connect({self.host.endpoint.worker: self.host.endpoint.address})
        return worker

    def dismiss(self, worker: WorkerId) -> None:
        if worker not in self.unreachable:
            super().dismiss(worker)
