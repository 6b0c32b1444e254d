"""A run's metrics where Prometheus can have them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import ray

from runtime.metrics import Metrics
from runtime.targets import announce, withdraw
from strategies.job import Job


@dataclass(frozen=True, slots=True)
class MetricsSettings:
    """``port`` None: none are served, 0: at any free one. ``targets`` is the folder in which Prometheus finds
    the run; ``peak_flops`` what a worker's device can do in a second, where a recipe says it."""

    port: int | None
    host: str = "127.0.0.1"
    targets: str | None = None
    peak_flops: float | None = None


class Exposition:
    """The metrics of ``run``, served and announced until ``close``.

    ``earlier`` is the port of a controller before this one: where the settings leave it open, who knows it
    still finds the run there. If somebody else has taken it meanwhile, any free one does, or none: a run that
    is under way is worth more than its charts. A worker has the share ``device_share`` of its device.
    Raises ValueError if the port of a new run cannot be had.
    """

    def __init__(
        self, run: str, settings: MetricsSettings, job: Job, device_share: float, earlier: int | None
    ) -> None:
        self.metrics = Metrics(
            run,
            checkpoint_every=job.checkpoint_every,
            peak_flops=settings.peak_flops,
            device_share=device_share,
        )
        self.port: int | None = None
        self._run, self._folder = run, settings.targets
        if settings.port is None:
            return
        try:
            self.port = self.metrics.serve(settings.port or earlier or 0, settings.host)
        except ValueError:
            if earlier is None:
                raise
            with suppress(ValueError):  # this may be another machine, without the host that is named
                self.port = self.metrics.serve(0, settings.host)
        if self._folder is not None and self.port is not None:
            address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            with suppress(OSError):  # a full disk costs the charts, not the run
                announce(Path(self._folder), "train", run, settings.host, self.port, address=address)

    def close(self) -> None:
        self.metrics.close()
        if self._folder is not None:
            withdraw(Path(self._folder), "train", self._run)
