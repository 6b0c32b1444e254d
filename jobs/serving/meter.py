"""What serving tells Prometheus: ``reknit_serve_...``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_REPLICA_GAUGES = {
    "version": "Optimizer steps behind the newest checkpoint that a replica has",
    "versions": "Checkpoints that a replica answers with at the moment",
    "waiting": "Sequences that wait in a replica",
    "running": "Sequences that a replica generates",
}
_REPLICA_COUNTERS = {
    "iterations": "Iterations of a replica's engine",
    "tokens": "Tokens that a replica has generated",
    "prompt_positions": "Positions of prompts that a replica has taken in",
    "busy_seconds": "Seconds that a replica's engine has computed",
}


class Meter:
    """One ingress' counts, in a registry of its own; all have the label ``run``."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "reknit_serve_requests", "Requests answered", ["run", "route", "status"], registry=self._registry
        )
        self.under_way = Gauge(
            "reknit_serve_under_way", "Requests under way", ["run"], registry=self._registry
        ).labels(run)
        self.tokens = Counter(
            "reknit_serve_tokens", "Tokens sent to clients", ["run"], registry=self._registry
        ).labels(run)
        self._seconds = Histogram(
            "reknit_serve_request_seconds",
            "Seconds from a request to the end of its answer",
            ["run", "route"],
            buckets=SECONDS_BUCKETS,
            registry=self._registry,
        )
        self.first_token_seconds = Histogram(
            "reknit_serve_first_token_seconds",
            "Seconds from a request to its first tokens",
            ["run"],
            buckets=SECONDS_BUCKETS,
            registry=self._registry,
        ).labels(run)
        self._continued = Gauge(
            "reknit_serve_continued", "Answers continued on another replica", ["run"], registry=self._registry
        ).labels(run)

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(self._run, route, str(status)).inc()
        self._seconds.labels(self._run, route).observe(seconds)

    def text(self, replicas: Iterable[Mapping[str, Any]], continued: int) -> bytes:
        """Everything in Prometheus' format; ``replicas`` are what they tell of themselves."""
        self._continued.set(continued)
        registry = CollectorRegistry()
        kinds = {**_REPLICA_GAUGES, **_REPLICA_COUNTERS}
        gauges = {
            name: Gauge(f"reknit_serve_replica_{name}", text, ["run", "process"], registry=registry)
            for name, text in kinds.items()
        }
        count = Gauge("reknit_serve_replicas", "Replicas that answer", ["run"], registry=registry).labels(
            self._run
        )
        for each in replicas:
            count.inc()
            for name, gauge in gauges.items():
                gauge.labels(self._run, str(each["process"])).set(each[name])
        return generate_latest(self._registry) + generate_latest(registry)
