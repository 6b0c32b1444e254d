"""A model behind HTTP as Ray Serve deployments: one ingress, and replicas that may die in mid-answer.

The ingress speaks HTTP and holds the clients' connections. Replicas generate. If a replica dies or hangs, the
ingress asks another one for the rest of every answer that it had begun; the client sees one unbroken answer.
What is asked for and how it is answered is the caller's: this file knows of tokens only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, Self

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import AutoscalingConfig, HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from actors.silence import SIGN_SECONDS, Silent, attended

APPLICATION = "reknit"
REPLICAS, INGRESS = "Replica", "Ingress"

ATTEMPTS = 8
"""How often one answer is begun or continued before the client is told that it cannot be had."""

STATS_SECONDS = 2.0
"""How long somebody who looks at the metrics waits for a replica's."""

ANSWER_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more tokens of an answer; ``finish`` says why it ended, None: there is more to come."""

    tokens: tuple[int, ...]
    version: int
    finish: str | None


class Asked(Protocol):
    """A picklable request."""

    def continued(self, given: tuple[int, ...], version: int) -> Self: ...


class Overloaded(Exception):
    """Every queue is full. ``seconds`` is when to try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__("all replicas are busy and their queue is full: try again later")
        self.seconds = seconds


class Unavailable(Exception):
    """No replica could finish an answer."""


class Generator(Protocol):
    """What a replica holds. ``generate`` gives a piece every ``SIGN_SECONDS``, without tokens if there are
    none; not so where it hangs."""

    def generate(self, asked: Any, every: int) -> AsyncIterator[Piece]: ...

    def stats(self) -> Mapping[str, Any]: ...

    def check(self) -> None: ...


class Replica:
    """One process that generates. ``build`` makes its ``Generator`` there."""

    def __init__(self, build: Callable[[], Generator]) -> None:
        from actors.ray_worker import SWITCH_INTERVAL  # imports torch, of which the ingress has no need

        sys.setswitchinterval(SWITCH_INTERVAL)  # the engine's thread must not keep the loop waiting
        self._generator = build()

    async def generate(self, asked: Any, every: int) -> AsyncIterator[Piece]:
        pieces = self._generator.generate(asked, every)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]

    async def stats(self) -> dict[str, Any]:
        return {**self._generator.stats(), "process": os.getpid()}

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica for which this raises."""
        self._generator.check()


class Replicas:
    """All replicas, as the ingress sees them."""

    def __init__(self, handle: DeploymentHandle[Any], scale: Scale) -> None:
        self._streams = handle.options(method_name="generate", stream=True)
        self._handle, self._scale = handle, scale
        self._under_way = 0
        self._looking: asyncio.Future[list[Any]] | None = None
        self.continued = 0
        """How many answers were continued on another replica."""

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place for one request, from before its body is read until its answer has been sent.

        Raises Overloaded where all places are taken.
        """
        if self._under_way >= self._scale.most_under_way:
            raise Overloaded(self._scale.retry_after)
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def generate(self, asked: Asked, every: int) -> AsyncIterator[Piece]:
        """The answer in pieces of at least ``every`` tokens, to its end, whatever happens to replicas.

        Raises ValueError for a request that the model cannot take, Unavailable when several replicas in a
        row have died of it, or hung.
        """
        given: list[int] = []
        rest, failures = asked, 0
        while True:
            stream: Any = self._streams.remote(rest, every)
            heard = attended(stream, self._scale.silence_seconds, self._is_one_silent)
            try:
                async with aclosing(heard) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        if not piece.tokens and piece.finish is None:
                            continue  # a sign of life
                        failures = 0
                        given += piece.tokens
                        rest = asked.continued(tuple(given), piece.version)
                        yield piece
                        if piece.finish is not None:
                            return
                error: Exception = Unavailable("a replica ended an answer before its end")
            except RayTaskError as raised:
                if isinstance(raised.cause, ValueError):
                    raise ValueError(str(raised.cause)) from None
                error = raised
            except (RayError, RayServeException, Silent) as raised:
                error = raised
            finally:
                with suppress(Exception):  # it has ended, or its replica has
                    stream.cancel()
            failures += 1
            if failures >= ATTEMPTS:
                raise Unavailable(f"{failures} replicas in a row failed to answer") from error
            self.continued += 1

    async def stats(self) -> list[dict[str, Any]]:
        """What each replica tells of itself; those that do not answer are left out."""
        return [each for each in await self._answers() if isinstance(each, dict)]

    async def _is_one_silent(self) -> bool:
        """Whether a replica does not answer. All who ask meanwhile share one look."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._answers())
        return any(not isinstance(each, dict) for each in await asyncio.shield(self._looking))

    async def _answers(self) -> list[Any]:
        """Every replica's stats, or what came of asking for them."""
        asked = self._handle.broadcast("stats")
        try:
            # in a thread, since Serve's own asynchronous call gives up on all when one does not answer
            return await asyncio.to_thread(asked.results, timeout_s=STATS_SECONDS, return_exceptions=True)
        except (TimeoutError, RayError, RayServeException):
            return []


@serve.ingress()
class Ingress:
    """``build`` makes the ASGI application around the replicas, in the ingress' own process."""

    def __init__(self, handle: DeploymentHandle[Any], build: Callable[[Replicas], Any], scale: Scale) -> None:
        self._app = build(Replicas(handle, scale))

    def __serve_build_asgi_app__(self) -> Any:
        return self._app


@dataclass(frozen=True, slots=True)
class Scale:
    """From ``least`` to ``most`` replicas of ``cpus`` each, so that each has about ``target`` requests under
    way. A replica takes ``concurrent`` at once; ``queued`` may wait beyond what ``most`` replicas take; who
    comes then is refused and told to try again after ``retry_after`` seconds. Answers of a replica that has
    given no sign of life for ``silence_seconds`` go on on another one. Replicas leave that have not been
    needed for ``idle_seconds``.
    """

    least: int = 1
    most: int = 1
    cpus: float = 1.0
    concurrent: int = 32
    queued: int = 128
    target: float = 16.0
    retry_after: int = 1
    silence_seconds: float = 10.0
    idle_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not self.silence_seconds >= 2 * SIGN_SECONDS:
            raise ValueError(
                f"silence-seconds is {self.silence_seconds:g}: it must be at least {2 * SIGN_SECONDS:g}, "
                f"since replicas give a sign of life every {SIGN_SECONDS:g} s"
            )
        if not 1 <= self.least <= self.most:
            raise ValueError(
                f"replicas from {self.least} to {self.most} make no sense: give two numbers from 1 on, the "
                "second at least the first"
            )

    @property
    def most_under_way(self) -> int:
        return self.most * self.concurrent + self.queued


def application(
    build_generator: Callable[[], Generator], build_app: Callable[[Replicas], Any], scale: Scale
) -> serve.Application:
    """Replicas and ingress, bound together; both builders are called where they run."""
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    replicas: Any = serve.deployment(
        Replica,
        name=REPLICAS,
        ray_actor_options={"num_cpus": scale.cpus},
        max_ongoing_requests=scale.concurrent,
        max_queued_requests=-1,  # the ingress counts them
        autoscaling_config=AutoscalingConfig(
            min_replicas=scale.least,
            initial_replicas=scale.least,
            max_replicas=scale.most,
            target_ongoing_requests=scale.target,
            metrics_interval_s=1.0,
            look_back_period_s=min(30.0, scale.idle_seconds / 2),
            upscale_delay_s=3.0,
            downscale_delay_s=scale.idle_seconds,
        ),
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=30.0,
        logging_config=quiet,
    )
    ingress: Any = serve.deployment(
        Ingress,
        name=INGRESS,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,
        health_check_period_s=5.0,
        logging_config=quiet,
    )
    bound: serve.Application = ingress.bind(replicas.bind(build_generator), build_app, scale)
    return bound


class ServedApplication:
    """An application on the Ray cluster that this process is connected to, as a context manager.

    Raises ValueError if Ray Serve is at work there already: its address cannot be changed.
    """

    def __init__(self, app: serve.Application, host: str, port: int) -> None:
        self._app, self._host, self._port = app, host, port

    def __enter__(self) -> ServedApplication:
        if any(
            each["name"] == "SERVE_CONTROLLER_ACTOR"
            for each in ray.util.list_named_actors(all_namespaces=True)
        ):
            raise ValueError(
                "Ray Serve is at work on this cluster already: stop it (`serve shutdown`), or serve from "
                "another cluster"
            )
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # this process' own
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=self._host, port=self._port),
            logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
        )
        try:
            serve.run(self._app, name=APPLICATION, route_prefix="/", logging_config=None)
        except BaseException:
            serve.shutdown()  # type: ignore[no-untyped-call]
            raise
        return self

    def __exit__(self, *_: object) -> None:
        serve.shutdown()  # type: ignore[no-untyped-call]

    def stats(self) -> list[dict[str, Any]]:
        """What each replica tells of itself."""
        handle = serve.get_deployment_handle(REPLICAS, APPLICATION)
        found = handle.broadcast("stats").results(timeout_s=ANSWER_SECONDS, return_exceptions=True)
        return [each for each in found if isinstance(each, dict)]
