"""The account of one simulated run: what befell it, what the controller heard and what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from runtime.plan import Plan, WorkerId
from runtime.protocol import Beat, Change, Held, Here, Interrupt, Measured, Resume, Stepped, Written
from runtime.sentences import sentence
from runtime.signals import (
    CommandsSent,
    Committed,
    Drain,
    Hire,
    Input,
    Joined,
    ManifestWritten,
    Note,
    Output,
    Send,
    TakenBack,
    Tick,
    WriteManifest,
)

NOISE = (Beat, Measured, Tick, CommandsSent)


@dataclass
class Journal:
    """Lines that begin with the simulated second."""

    lines: list[str] = field(default_factory=list)

    def fault(self, now: float, what: str) -> None:
        self._add(now, f"**** {what}")

    def heard(self, now: float, event: Input) -> None:
        """An input of the controller; what says nothing but that all is well is left out."""
        if not isinstance(event, NOISE):
            self._add(now, f"  <- {_heard(event)}")

    def did(self, now: float, outputs: Iterable[Output]) -> None:
        """What the controller answered; one command to many takes one line."""
        sent: dict[str, list[WorkerId]] = {}
        for output in outputs:
            if isinstance(output, Send):
                sent.setdefault(_command(output), []).append(output.worker)
            else:
                self._add(now, f"  -> {_did(output)}")
        for command, workers in sent.items():
            self._add(now, f"  -> to {workers}: {command}")

    def _add(self, now: float, text: str) -> None:
        self.lines.append(f"{now:9.4f} {text}")


def _heard(event: Input) -> str:
    match event:
        case Joined(worker, domain):
            return f"worker {worker} is ready ({domain})"
        case Drain(worker, reason, deadline):
            return f"worker {worker} is to go: {reason}, deadline {deadline}"
        case Held(worker, generation):
            versions = dict(sorted(Counter(h.version for h in event.holdings).items()))
            exponents = dict(event.exponents)
            return f"Held by {worker} in {generation}: {versions} shards by version, exponents {exponents}"
        case Here(worker):
            known = f"generation {event.generation}, pending {event.pending}, version {event.version}"
            records = [record.step for record in event.records]
            return f"Here is {worker}: {known}, records {records}, {_plan(event.plan)}"
        case Stepped(worker, record):
            return f"worker {worker} tells of step {record.step} in generation {record.generation}"
        case Written(worker, generation, version):
            return f"worker {worker} has written its part of version {version} in generation {generation}"
        case ManifestWritten(durable):
            return f"the checkpoint of version {durable.version} is whole"
    return str(event)


def _did(output: Output) -> str:
    match output:
        case Note(event):
            return sentence(event)
        case Committed(record):
            return f"step {record.step} is on record"
        case TakenBack(version):
            return f"records after {version} are taken back"
        case Hire(worker):
            return f"asks for worker {worker}"
        case WriteManifest(version):
            return f"has the checkpoint of version {version} finished"
    return str(output)


def _command(send: Send) -> str:
    match send.command:
        case Resume(plan, version, source):
            record = send.command.record
            known = "no record" if record is None else f"the record of {record.step}"
            return (
                f"Resume at version {version} from {source} to {send.command.stop_at}, "
                f"{len(send.command.transfers)} transfers, {known}, {_plan(plan)}"
            )
        case Change(plan):
            count = len(send.command.transfers)
            return f"Change, usher {send.command.usher}, {count} transfers, {_plan(plan)}"
        case Interrupt(generation, lost):
            return f"Interrupt {generation}, lost {lost}"
    return str(send.command)


def _plan(plan: Plan | None) -> str:
    if plan is None:
        return "no plan"
    return f"plan {plan.generation} of {[stage.workers for stage in plan.stages]}"
