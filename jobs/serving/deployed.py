"""A run's model as a Ray Serve application for Ray's configuration files: ``jobs.serving.deployed:app``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt
from ray import serve

from actors.serving import Replicas, Scale, application
from jobs.recipe.section import Section
from jobs.serving.app import AppSettings, build
from jobs.serving.host import WATCH_SECONDS, EngineHost
from jobs.serving.scheduler import Limits
from jobs.serving.service import Service
from jobs.serving.source import RunSource, service_of
from runtime.settings import serve_token


class Deployed(Section):
    """The arguments: as ``reknit serve`` has them. ``run`` is a run's folder that every node reaches."""

    run: str
    checkpoint: int | None = None
    least: PositiveInt = 1
    most: PositiveInt = 1
    queue: int = Field(default=128, ge=0)
    threads: PositiveInt = 1
    max_request_mb: PositiveInt = 16
    silence_seconds: float = 10.0


def app(arguments: dict[str, Any]) -> serve.Application:
    """The application. The bearer token is not among its arguments, which Ray keeps and shows: the ingress
    takes it from its own environment. Raises ValueError for a mistake in the arguments and for a run that
    cannot be served.
    """
    asked = Deployed.model_validate(arguments)
    source = RunSource(Path(asked.run).expanduser().absolute(), asked.checkpoint)
    _, decoder = source.first()
    return application(
        partial(EngineHost, source, Limits(), asked.threads, WATCH_SECONDS),
        partial(_build, service_of(source, decoder), asked.max_request_mb << 20),
        Scale(
            asked.least,
            asked.most,
            cpus=float(asked.threads),
            queued=asked.queue,
            silence_seconds=asked.silence_seconds,
        ),
    )


def _build(service: Service, most_bytes: int, replicas: Replicas) -> Any:
    return build(service, AppSettings(serve_token(), most_bytes), replicas)
