"""Prometheus metrics of a run, all with the label ``run``. Those of its workers: ``worker_metrics``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from threading import Thread
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from runtime.events import (
    CheckpointWritten,
    Event,
    FeedWorkerLost,
    Paused,
    Recovered,
    RecoverySeconds,
    Resumed,
    RunStarted,
    StepRecord,
    WorkerJoined,
)
from runtime.goodput import BADPUT, Ledger
from runtime.plan import WorkerId
from runtime.protocol import Measured
from runtime.worker_metrics import WorkerMetrics

STEP_SECONDS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
_PHASES = tuple(field.name for field in fields(RecoverySeconds))


class Metrics:
    """One run's metrics in a registry of their own, so that several runs fit in one process.

    ``observe_*`` may be called from any thread but for each kind from one at a time.

    ``checkpoint_every`` is in steps, 0: none on the way. ``peak_flops`` is what a worker's device can do in a
    second (FLOP/s), for one that is not known; a worker has the share ``device_share`` of a known one.
    """

    def __init__(
        self,
        run: str,
        *,
        checkpoint_every: int = 0,
        peak_flops: float | None = None,
        device_share: float = 1.0,
    ) -> None:
        self.registry = CollectorRegistry()
        self._run = run
        self._given_peak, self._device_share = peak_flops, device_share
        self._step_flops: int | None = None
        self._served: tuple[Any, Thread] | None = None
        self._workers_told = WorkerMetrics(run)
        self.registry.register(self._workers_told)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"reknit_{name}", text, ["run"], registry=self.registry).labels(run)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"reknit_{name}", text, ["run"], registry=self.registry).labels(run)

        def later(name: str, text: str) -> Gauge:
            """Without a series until there is a value: zero would be a lie."""
            return Gauge(f"reknit_{name}", text, ["run"], registry=self.registry)

        self._step = gauge("step", "Newest committed step")
        self._target_step = gauge("target_step", "Step that the run is to end with")
        self._step_time = gauge("step_time_seconds", "When the newest step was committed (Unix time)")
        self._loss = later("loss", "Training loss of the newest step")
        self._held_out_loss = later("held_out_loss", "Newest loss on held-out data")
        self._half_depth_loss = later("half_depth_loss", "Newest loss on held-out data by half the stages")
        self._gradient_norm = later("gradient_norm", "Global gradient norm before clipping")
        self._learning_rate = later("learning_rate", "Learning rate of the newest step")
        self._peak_flops = later("peak_flops", "What the devices of all workers can do, FLOP/s")
        self._model_flops = Counter(
            "reknit_model_flops",
            "Floating-point operations of the model in committed steps",
            ["run"],
            registry=self.registry,
        )
        self._workers = gauge("workers", "Workers that train")
        self._generation = gauge("generation", "Membership changes so far")
        self._checkpoint_step = gauge("checkpoint_step", "Steps behind the newest durable checkpoint")
        self._checkpoint_time = gauge("checkpoint_time_seconds", "When that was written (Unix time)")
        gauge("checkpoint_every_steps", "Steps between checkpoints; 0: none on the way").set(checkpoint_every)
        self._goodput_ratio = gauge("goodput_ratio", "Productive share of the wall time")
        self._tokens = counter("tokens", "Tokens trained on")
        self._samples = counter("samples", "Samples trained on")
        self._repeats = counter("step_repeats", "Extra attempts at steps")
        self._recoveries = counter("recoveries", "Losses of workers recovered from")
        self._feed_losses = counter("feed_workers_lost", "Losses of workers that prepare data")
        self._goodput = counter("goodput_seconds", "Productive seconds of committed steps")
        self._step_seconds = Histogram(
            "reknit_step_seconds",
            "Seconds from one committed step to the next",
            ["run"],
            buckets=STEP_SECONDS_BUCKETS,
            registry=self.registry,
        ).labels(run)
        recovery_seconds = Counter(
            "reknit_recovery_seconds", "Seconds of recovery", ["run", "phase"], registry=self.registry
        )
        badput = Counter(
            "reknit_badput_seconds", "Seconds that trained nothing", ["run", "cause"], registry=self.registry
        )
        # Every series exists from the start, at zero: rate() sees the first increase too.
        self._recovery_seconds = {phase: recovery_seconds.labels(run, phase) for phase in _PHASES}
        self._badput = {cause: badput.labels(run, cause) for cause in BADPUT}
        self._booked: dict[str, int] = {}

    def observe_step(self, record: StepRecord) -> None:
        self._step.set(record.step)
        self._step_time.set(record.committed_at)
        self._loss.labels(self._run).set(record.loss)
        if record.held_out_loss is not None:
            self._held_out_loss.labels(self._run).set(record.held_out_loss)
        if record.half_depth_loss is not None:
            self._half_depth_loss.labels(self._run).set(record.half_depth_loss)
        self._gradient_norm.labels(self._run).set(record.grad_norm)
        self._learning_rate.labels(self._run).set(record.learning_rate)
        if self._step_flops is not None:
            self._model_flops.labels(self._run).inc(self._step_flops)
        self._workers.set(record.workers)
        self._generation.set(record.generation)
        self.count_step(record)

    def count_step(self, record: StepRecord) -> None:
        """What adds up; of a step that others have followed it is all that matters."""
        self._tokens.inc(record.tokens)
        self._samples.inc(record.samples)
        self._repeats.inc(record.attempts - 1)
        self._step_seconds.observe(record.seconds)

    def observe_event(self, event: Event, now: float) -> None:
        """``now``: when it happened, in seconds since 1970."""
        match event:
            case Recovered():
                if event.lost:
                    self._recoveries.inc()
                for phase in _PHASES:
                    self._recovery_seconds[phase].inc(getattr(event.seconds, phase))
                self._workers.set(event.workers_after)
            case WorkerJoined():
                self._workers.set(event.workers_after)
            case RunStarted():
                self._workers.set(event.workers)
                self._target_step.set(event.steps)
                self._step.set(event.from_version)
                self._checkpoint_step.set(event.from_version)
                self._step_time.set(now)
                self._checkpoint_time.set(now)
            case Paused() | Resumed():
                self._workers.set(event.workers)
            case FeedWorkerLost():
                self._feed_losses.inc()
            case CheckpointWritten():
                self._checkpoint_step.set(event.version)
                self._checkpoint_time.set(now)

    def observe_members(self, workers: Iterable[WorkerId]) -> None:
        """These have work from now on; the others' series end."""
        self._workers_told.keep(workers)
        self._sum_peaks()

    def observe_worker(self, measured: Measured, speed: float) -> None:
        """One worker's step; ``speed``: see ``runtime.speeds.Speeds.of``."""
        self._step_flops = measured.step_flops
        if self._workers_told.observe(measured, speed):
            self._sum_peaks()

    def _sum_peaks(self) -> None:
        """No series where one device's peak is not known."""
        share = self._device_share
        peaks = [
            self._given_peak if self._given_peak is not None else peak and peak * share
            for peak in self._workers_told.peaks()
        ]
        known = [peak for peak in peaks if peak is not None]
        if known and len(known) == len(peaks):
            self._peak_flops.labels(self._run).set(sum(known))
        else:
            self._peak_flops.clear()

    def observe_ledger(self, ledger: Ledger) -> None:
        """A counter never falls: where time was booked under another cause afterwards, the
        counter it left waits until the ledger has caught up. The ratio is always the ledger's.
        """
        self._goodput_ratio.set(ledger.goodput)
        self._raise_to(self._goodput, "productive", ledger.committed)
        for cause, counter in self._badput.items():
            self._raise_to(counter, cause, ledger.nanoseconds[cause])

    def _raise_to(self, counter: Counter, cause: str, nanoseconds: int) -> None:
        booked = self._booked.get(cause, 0)
        if nanoseconds > booked:
            counter.inc((nanoseconds - booked) / 1e9)
            self._booked[cause] = nanoseconds

    def serve(self, port: int = 0, host: str = "127.0.0.1") -> int:
        """Serves the metrics over HTTP until ``close`` and returns the port (0: any free one).

        Raises ValueError if the port cannot be had.
        """
        assert self._served is None, "already served"
        try:
            server, thread = start_http_server(port, host, registry=self.registry)
        except OSError as error:
            raise ValueError(
                f"metrics cannot be served at {host}:{port} ({error.strerror}): set metrics.port to a "
                f"free port, or to 0 for any"
            ) from error
        self._served = server, thread
        return int(server.server_port)

    def close(self) -> None:
        """Stops serving and frees the port. Idempotent."""
        if self._served is not None:
            server, thread = self._served
            self._served = None
            server.shutdown()
            server.server_close()
            thread.join()
