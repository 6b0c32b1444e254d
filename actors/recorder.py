"""What is kept of a run: the run folder, the goodput ledger, the metrics, and the lines people see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from threading import Lock

from runtime.events import (
    Event,
    Outcome,
    Paused,
    Rebalanced,
    RecordLost,
    Recovered,
    Resumed,
    RunFinished,
    RunStarted,
    StepRecord,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
)
from runtime.goodput import Ledger
from runtime.metrics import Metrics
from runtime.plan import Plan
from runtime.run_folder import RunFolder
from runtime.sentences import sentence

BOOKS_SECONDS = 2.0
"""How often the goodput goes on record at most, apart from events."""


@dataclass(frozen=True, slots=True)
class RunProgress:
    """What happened since the last look: ``lines`` and ``steps`` are new, the rest is as of now."""

    steps: tuple[StepRecord, ...]
    steps_total: int
    events: tuple[Event, ...]
    lines: tuple[str, ...]
    goodput: float
    workers: int
    outcome: Outcome | None
    message: str


@dataclass
class Recorder:
    """Written by the controller's thread, read by whoever shows the run. ``now`` is in seconds."""

    folder: RunFolder
    metrics: Metrics
    ledger: Ledger
    steps: list[StepRecord] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    workers: int = 0
    outcome: Outcome | None = None
    message: str = ""
    _lock: Lock = field(default_factory=Lock)
    _unlogged: bool = False
    _books_at: float = 0.0

    @classmethod
    def replay(cls, folder: RunFolder, metrics: Metrics, now: float, *, since: float = 0.0) -> Recorder:
        """Takes up the record of a run whose controller died: books and counts as if it had lived on.

        Only the last start of a run that was resumed counts, as it did before; ``since`` is when it began
        (seconds since 1970), which the record itself does not tell until the first step may begin.
        """
        logged = tuple(entry for entry in folder.read_events().events if entry.time >= since)
        starts = [index for index, entry in enumerate(logged) if isinstance(entry.event, RunStarted)]
        logged = logged[starts[-1] :] if starts else ()
        began = logged[0].time if logged else now
        recorder = cls(folder, metrics, Ledger.begin(_nanoseconds(began)))
        first = logged[0].event.from_version + 1 if starts and isinstance(logged[0].event, RunStarted) else 1
        steps = [step for step in folder.read_steps().steps if step.step >= first]
        entries: list[tuple[float, Event | StepRecord]] = [
            *((entry.time, entry.event) for entry in logged),
            *((step.committed_at, step) for step in steps),
        ]
        reached = began
        for time, what in sorted(entries, key=lambda entry: entry[0]):
            reached = min(max(reached, time), now)  # clocks of several machines
            if isinstance(what, StepRecord):
                recorder._keep(what, reached)
                if what is steps[-1]:
                    metrics.observe_step(what)
                else:
                    metrics.count_step(what)
            else:
                recorder.events.append(what)
                recorder._book(what, _nanoseconds(reached))
                metrics.observe_event(what, reached)
                if isinstance(what, RunFinished):
                    recorder.outcome, recorder.message = what.outcome, what.detail
        metrics.observe_ledger(recorder.ledger)
        return recorder

    def event(self, event: Event, now: float) -> None:
        """Logs an event and books its time."""
        with self._lock:
            self._write(lambda: self.folder.log_event(event, now))
            self._note(event, now)
            self._log_books(now)

    def plan(self, plan: Plan, now: float) -> None:
        """Logs who does what from now on."""
        with self._lock:
            self._write(lambda: self.folder.log_plan(plan, now))

    def _log_books(self, now: float) -> None:
        self._books_at = now
        books = self.ledger.at(max(self.ledger.now, _nanoseconds(now)))  # threads note events too
        self._write(lambda: self.folder.log_books(books, now))

    def _note(self, event: Event, now: float) -> None:
        self.events.append(event)
        self._book(event, _nanoseconds(now))
        self.metrics.observe_event(event, now)
        self.metrics.observe_ledger(self.ledger)

    def _write(self, log: Callable[[], None]) -> None:
        """A full disk costs the record, not the run: said once, and kept in memory for whoever watches."""
        try:
            log()
        except OSError as error:
            if not self._unlogged:
                self._unlogged = True
                self.events.append(RecordLost(f"the run folder cannot be written: {error}"))

    def _book(self, event: Event, now: int) -> None:
        match event:
            case RunStarted():
                self.workers = event.workers
                self.ledger = self.ledger.enter(now, "productive")
            case WorkerLost(idle=False):
                self.ledger = self.ledger.waste(now).enter(now, "recovery_agree")
            case Paused():
                self.workers = event.workers
                self.ledger = self.ledger.enter(now, "paused")
            case WorkerJoined():
                self.workers = event.workers_after
                self.ledger = self.ledger.move("productive", "join", _nanoseconds(event.seconds))
            case WorkerLeft() | Rebalanced():
                self.workers = event.workers_after if isinstance(event, WorkerLeft) else self.workers
                self.ledger = self.ledger.move("productive", "recovery_move", _nanoseconds(event.seconds))
            case Resumed():
                self.workers = event.workers
                self.ledger = self.ledger.enter(now, "productive")
            case Recovered():
                self.workers = event.workers_after
                self._book_recovery(event, now)

    def _book_recovery(self, event: Recovered, now: int) -> None:
        ledger = self.ledger.enter(now, "productive")
        seconds = event.seconds
        ledger = ledger.move("recovery_agree", "recovery_plan", _nanoseconds(seconds.plan))
        ledger = ledger.move("recovery_agree", "recovery_move", _nanoseconds(seconds.move))
        # the interrupted step's lost work is the part that is done again; the time until the loss was
        # noticed was spent waiting inside that step
        ledger = ledger.move("wasted_progress", "recovery_detect", _nanoseconds(seconds.detect))
        if event.source == "peers":
            ledger = ledger.move("wasted_progress", "recovery_redo", _nanoseconds(seconds.redo))
        self.ledger = ledger

    def take_back(self, version: int) -> None:
        """The recorded steps after ``version`` will be committed again: their time was wasted."""
        with self._lock:
            lost = sum(step.seconds for step in self.steps if step.step > version)
            self.ledger = self.ledger.move("productive", "wasted_progress", _nanoseconds(lost))
            self._write(lambda: self.folder.supersede_steps(version + 1))
            self.steps = [step for step in self.steps if step.step <= version]

    def step(self, record: StepRecord, now: float) -> None:
        """Logs a committed step."""
        with self._lock:
            self._write(lambda: self.folder.log_step(record))
            self._keep(replace(record, read=()), now)  # that is for the file only
            self.metrics.observe_step(record)
            self.metrics.observe_ledger(self.ledger)
            if now - self._books_at >= BOOKS_SECONDS:
                self._log_books(now)

    def _keep(self, record: StepRecord, now: float) -> None:
        self.steps.append(record)
        self.ledger = self.ledger.commit(_nanoseconds(now))

    def committed_at(self, step: int) -> float | None:
        """When ``step`` was committed (seconds since 1970, its reporter's clock); None if it is not on
        record."""
        with self._lock:
            found = (record.committed_at for record in reversed(self.steps) if record.step == step)
            return next(found, None)

    def waited_for_data(self, seconds: float) -> None:
        """Books one worker's wait for data in a step, as its part of the run's productive time."""
        with self._lock:
            share = _nanoseconds(seconds / max(1, self.workers))
            self.ledger = self.ledger.move("productive", "data_wait", share)

    def writing_checkpoint(self, now: float) -> None:
        """From now on nothing but the last checkpoint is worked on."""
        with self._lock:
            self.ledger = self.ledger.enter(_nanoseconds(now), "checkpoint")

    def finish(self, outcome: Outcome, message: str, now: float) -> None:
        """Closes the books."""
        finished = RunFinished(
            outcome=outcome,
            step=self.steps[-1].step if self.steps else 0,
            workers=self.workers,
            seconds=(_nanoseconds(now) - self.ledger.started) / 1e9,
            goodput=self.ledger.at(_nanoseconds(now)).goodput,
            detail="" if outcome == "completed" else message.splitlines()[0],
        )
        self.event(finished, now)
        with self._lock:
            self.ledger = self.ledger.at(_nanoseconds(now))
            self.outcome, self.message = outcome, message
            self.folder.close()

    def progress(self, steps_seen: int, events_seen: int) -> RunProgress:
        """What came after the first ``steps_seen`` steps and ``events_seen`` events."""
        with self._lock:
            events = tuple(self.events[events_seen:])
            return RunProgress(
                steps=tuple(self.steps[steps_seen:]),
                steps_total=len(self.steps),
                events=events,
                lines=tuple(sentence(event) for event in events),
                goodput=self.ledger.goodput,
                workers=self.workers,
                outcome=self.outcome,
                message=self.message,
            )

    def badput(self) -> Mapping[str, float]:
        """Seconds by cause."""
        with self._lock:
            return {cause: ns / 1e9 for cause, ns in self.ledger.nanoseconds.items()}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
