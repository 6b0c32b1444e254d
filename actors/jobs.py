"""Ray's job API as Reknit uses it: the only place that knows ``JobSubmissionClient``.

Everything goes over HTTP to the head's dashboard, so that it works from a machine that is no part of the
cluster.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from runtime.settings import without_ray_addresses

Status = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]

STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
"""In a job's environment: whole seconds from SIGTERM to SIGKILL. Ray's default is 3."""

CONNECT_SECONDS = 10.0
"""How long the head may take to accept a connection."""

LOOK_SECONDS = 5.0
"""After so much silence whoever follows a log looks at the job's status."""

_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)
"""What tells of every folder that is left out of an upload."""

ENTRY_LINE = "Running entrypoint for job "
"""How the line begins that Ray writes into a job's log before the job's own ones."""


class ContactLost(ConnectionError):
    """The head does not answer any more; the job may go on."""


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as Ray knows it. Times are in seconds since 1970; ``working_dir`` is the URI of what was
    uploaded; ``exit_code`` is the entry point's, where it ended by itself."""

    id: str
    status: Status
    entrypoint: str
    message: str = ""
    started: float | None = None
    ended: float | None = None
    exit_code: int | None = None
    working_dir: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class Jobs:
    """The jobs of the cluster whose dashboard is at ``address``, such as http://HEAD:8265.

    Raises ValueError if nothing answers there or it wants a token; the methods raise ContactLost if that
    changes.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"{address!r} is no address of a Ray dashboard: it has the form http://HEAD:8265"
            )
        self.address = address
        try:
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            socket.create_connection((parts.hostname, port), CONNECT_SECONDS).close()
        except OSError as error:
            raise ValueError(
                f"no Ray cluster answers at {address} ({error.strerror or error}): name the dashboard of its "
                "head by --address http://HEAD:8265"
            ) from None
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            with without_ray_addresses():  # Ray takes those even where an address is given
                self._client = JobSubmissionClient(address)
        except (ConnectionError, requests.RequestException, RuntimeError, ValueError) as error:
            raise ValueError(f"what answers at {address} is no Ray dashboard: {_line(error)}") from None
        except AuthenticationError as error:
            raise ValueError(_refused(address, error)) from None

    def submit(
        self,
        job: str,
        entrypoint: str,
        *,
        working_dir: str | None = None,
        excludes: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Uploads the local folder ``working_dir`` (or takes what is at that URI) and starts ``entrypoint``,
        a shell command, in it. Raises ValueError if the id ``job`` was used before or what is given is
        refused."""
        runtime: dict[str, Any] = {"env_vars": dict(environment or {})}
        if working_dir is not None:
            runtime |= {"working_dir": working_dir, "excludes": list(excludes)}
        with self._contact():
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job,
                    runtime_env=runtime,
                    metadata=dict(metadata or {}),
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    raise ValueError(
                        f"{job} is the id of an earlier job on this cluster: choose another"
                    ) from None
                raise

    def find(self, job: str) -> JobState | None:
        """None if the cluster knows no submitted job of that id."""
        with self._contact():
            try:
                found = self._client.get_job_info(job)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise
        return _state(found)

    def all(self) -> list[JobState]:
        """All submitted jobs, those that have ended too, in the order in which they started."""
        with self._contact():
            found = [_state(job) for job in self._client.list_jobs()]
        return sorted((job for job in found if job is not None), key=lambda job: job.started or 0.0)

    def stop(self, job: str) -> None:
        """SIGTERM to the entry point, and SIGKILL when the job's stop wait is over. Does not wait."""
        with self._contact():
            self._client.stop_job(job)

    def forget(self, job: str) -> None:
        """Takes a job that has ended from the cluster's list. Failing to do so is no error."""
        with suppress(ContactLost), self._contact():
            self._client.delete_job(job)

    def log(self, job: str) -> str:
        """What the job has printed so far."""
        with self._contact():
            return str(self._client.get_job_logs(job))

    def tail(self, job: str) -> Iterator[str]:
        """What the job prints, in pieces, from its beginning on until the stream ends, which says nothing of
        the job. An empty piece: nothing has come for some seconds."""
        stream: Any = self._client.tail_job_logs(job)
        loop = asyncio.new_event_loop()
        pending: asyncio.Task[Any] | None = None
        try:
            while True:
                pending = pending or loop.create_task(_next(stream))
                with self._contact():
                    done, _ = loop.run_until_complete(asyncio.wait([pending], timeout=LOOK_SECONDS))
                    piece = "" if not done else pending.result()
                if piece is None:
                    return
                if done:
                    pending = None
                yield piece
        finally:
            if pending is not None:
                pending.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    loop.run_until_complete(pending)
            with suppress(Exception):
                loop.run_until_complete(stream.aclose())
            loop.close()

    @contextmanager
    def _contact(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise ValueError(_refused(self.address, error)) from None
        except (OSError, aiohttp.ClientError, requests.RequestException, RuntimeError) as error:
            raise ContactLost(f"{self.address} does not answer as it should: {_line(error)}") from None


async def _next(stream: Any) -> str | None:
    """The next piece, None at the end."""
    try:
        return str(await anext(stream))
    except StopAsyncIteration:
        return None


def _state(job: JobDetails) -> JobState | None:
    if not job.submission_id:
        return None  # a driver that somebody started by hand
    runtime = job.runtime_env or {}
    return JobState(
        id=job.submission_id,
        status=job.status.value,
        entrypoint=job.entrypoint,
        message=job.message or "",
        started=None if job.start_time is None else job.start_time / 1e3,
        ended=None if not job.end_time else job.end_time / 1e3,
        exit_code=job.driver_exit_code,
        working_dir=runtime.get("working_dir"),
        metadata=dict(job.metadata or {}),
    )


def _refused(address: str, error: BaseException) -> str:
    return f"{address} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN ({_line(error)})"


def _line(error: BaseException) -> str:
    """What an error says, in a line: the last one of a traceback that Ray passed on."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return (lines[-1] if "Traceback" in str(error) else lines[0]).rstrip(".")


def follow(
    jobs: Jobs,
    job: str,
    write: Callable[[str], object],
    *,
    patience: float,
    clock: Callable[[], float],
    sleep: Callable[[float], object],
    skip: int = 0,
) -> JobState:
    """Writes the job's log as it grows until the job has ended, and returns its last state.

    The job's status decides, not the stream: one that breaks off is taken up again where it was, also after
    the head was away for up to ``patience`` seconds. ``skip``: so many characters are known already. Raises
    ContactLost when the patience is over, ValueError if the cluster does not know the job (any more).
    """
    seen, pause, lost_at = skip, 0.0, None
    while True:
        try:
            reached = 0
            for piece in jobs.tail(job):
                lost_at, pause = None, 0.0
                reached += len(piece)
                if reached > seen:
                    write(piece[seen - reached :])
                    seen = reached
                if not piece and _known(jobs, job).is_over:
                    break
            state = _known(jobs, job)
            lost_at = None
            if state.is_over:
                with suppress(ContactLost):  # the machine that holds the log may be gone
                    rest = jobs.log(job)[seen:]
                    if rest:
                        write(rest)
                return state
        except ContactLost:
            lost_at = clock() if lost_at is None else lost_at
            if clock() - lost_at >= patience:
                raise
        pause = min(max(2 * pause, 0.25), 5.0)
        sleep(pause)


def _known(jobs: Jobs, job: str) -> JobState:
    state = jobs.find(job)
    if state is None:
        raise ValueError(f"the cluster at {jobs.address} knows no job {job}")
    return state
