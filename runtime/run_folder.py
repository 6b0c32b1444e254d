"""The run folder: everything a run leaves on local disk, and how it is read back.

``recipe.toml`` (resolved), ``run.json`` (seed, versions, device), ``events.jsonl``, ``steps.jsonl`` and
``samples.jsonl``, the ledger of the samples used, ``plans.jsonl`` and ``goodput.jsonl`` (all append-only),
``timeline.jsonl`` (replaced as a whole), ``controller.json`` (where to find the run), ``checkpoints/``,
``ray.log``.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from runtime import samples
from runtime.events import Event, StepRecord, from_json, step_from_json, step_to_json, to_json
from runtime.goodput import Ledger
from runtime.plan import Plan
from runtime.plan_record import plan_to_json

READABLE = (
    "run.json",
    "recipe.toml",
    "events.jsonl",
    "steps.jsonl",
    "plans.jsonl",
    "goodput.jsonl",
    "timeline.jsonl",
)
"""The files that whoever shows a run is given. None of them holds a secret or a checkpoint."""

PIECE = 4 << 20
"""Bytes that ``RunFolder.piece`` returns at most."""

_BLOCK = 1 << 16
_SUPERSEDED_FROM = "superseded_from"
_Parsed = TypeVar("_Parsed")


class JsonLinesWriter:
    """Appends JSON objects, one a line, each with a single write: what a killed process has
    appended is in the file. A torn last line (the machine died) is cut off on opening, and what was written
    of a line that the disk has no room for at once. Thread-safe.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._descriptor).st_size
        whole = _whole_lines(self._descriptor, size)
        if whole < size:
            os.ftruncate(self._descriptor, whole)

    def append(self, record: Mapping[str, Any]) -> None:
        """Raises OSError."""
        line = json.dumps(dict(record)).encode() + b"\n"
        with self._lock:
            before = os.fstat(self._descriptor).st_size
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except OSError:
                os.ftruncate(self._descriptor, before)  # or the next line is glued to it
                raise

    def close(self) -> None:
        """Forces everything to disk. Idempotent."""
        with self._lock:
            if self._descriptor >= 0:
                os.fsync(self._descriptor)
                os.close(self._descriptor)
                self._descriptor = -1


def _whole_lines(descriptor: int, size: int) -> int:
    """How many of the first ``size`` bytes of a file are whole lines. Reads from the end: logs are long."""
    while size:
        start = max(0, size - _BLOCK)
        newline = os.pread(descriptor, size - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        size = start
    return 0


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The records, and a sentence about a torn last line if there is one (else None).

    A file that is not there has no records. Raises ValueError, naming file and line, for a line that
    is no JSON object anywhere else.
    """
    if not path.exists():
        return [], None
    *lines, tail = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is no JSON object")
        records.append(record)
    torn = f"{path}, line {len(lines) + 1} is torn ({len(tail)} bytes) and was left out." if tail else None
    return records, torn


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """``time`` is in seconds since 1970."""

    time: float
    event: Event


@dataclass(frozen=True, slots=True)
class EventLog:
    """``torn`` tells of a last line that was cut short, else None."""

    events: tuple[LoggedEvent, ...]
    torn: str | None


@dataclass(frozen=True, slots=True)
class StepLog:
    """The steps of the run as it stands, ascending; ``torn`` as in ``EventLog``."""

    steps: tuple[StepRecord, ...]
    torn: str | None


def default_path(recipe_name: str, parent: Path = Path("runs"), now: datetime | None = None) -> Path:
    """``runs/<recipe name>-<YYYYmmdd-HHMMSS>-<4 hex digits>``, local time."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", recipe_name).strip("-.") or "run"
    stamp = (now or datetime.now()).strftime("%Y%m%d-%H%M%S")
    return parent / f"{name}-{stamp}-{secrets.token_hex(2)}"


class RunFolder:
    """The folder of one run. Writing is for one process, reading for any."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self._events: JsonLinesWriter | None = None
        self._steps: JsonLinesWriter | None = None
        self._samples: JsonLinesWriter | None = None
        self._plans: JsonLinesWriter | None = None
        self._books: JsonLinesWriter | None = None

    @classmethod
    def create(
        cls, path: str | Path, recipe_toml: str, facts: Mapping[str, Any], *, resume: bool = False
    ) -> RunFolder:
        """Makes the folder, or with ``resume`` takes up the one that is there.

        ``facts`` (seed, versions, threads, device kind: JSON values) go to ``run.json``; a resume adds
        its own to the list ``resumes``, and keeps a recipe that it changes as ``recipe-<n>.toml``.
        Raises ValueError if the folder holds a run already, or none to resume.
        """
        folder = cls(path)
        if folder.exists() and not resume:
            raise ValueError(
                f"{folder.path} already holds a run: choose another folder, or go on with it by --resume"
            )
        if resume and not folder.exists():
            raise ValueError(f"{folder.path} holds no run to resume: start it without --resume")
        folder.path.mkdir(parents=True, exist_ok=True)
        recorded: dict[str, Any]
        if resume:
            recorded = folder.facts()
            recorded["resumes"] = [*recorded.get("resumes", []), dict(facts)]
            if folder.recipe.exists() and folder.recipe.read_text(encoding="utf-8") != recipe_toml:
                folder.recipe.replace(folder.path / f"recipe-{len(recorded['resumes'])}.toml")
        else:
            recorded = dict(facts)
        _replace(folder.recipe, recipe_toml)
        _replace(folder.facts_file, json.dumps(recorded, indent=2) + "\n")
        return folder

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def facts_file(self) -> Path:
        return self.path / "run.json"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def steps_file(self) -> Path:
        return self.path / "steps.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def plans_file(self) -> Path:
        return self.path / "plans.jsonl"

    @property
    def goodput_file(self) -> Path:
        return self.path / "goodput.jsonl"

    @property
    def timeline_file(self) -> Path:
        return self.path / "timeline.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def controller_file(self) -> Path:
        return self.path / "controller.json"

    def controller_facts(self) -> dict[str, Any]:
        """Where the run's controller is to be found, and how often it was started. Empty before the first.
        Raises ValueError if the file is not readable."""
        try:
            return dict(json.loads(self.controller_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ValueError(f"{self.controller_file} is no JSON: {error}") from error

    def note_controller(self, **facts: Any) -> None:
        """Adds ``facts`` to what is known of the controller."""
        _replace(self.controller_file, json.dumps({**self.controller_facts(), **facts}, indent=2) + "\n")

    @property
    def ray_log(self) -> Path:
        """What Ray printed meanwhile."""
        return self.path / "ray.log"

    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return self.facts_file.exists()

    def facts(self) -> dict[str, Any]:
        """The content of ``run.json``. Raises ValueError if there is no run or it is not readable."""
        try:
            facts = json.loads(self.facts_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{self.path} holds no run: it has no run.json") from None
        except ValueError as error:
            raise ValueError(f"{self.facts_file} is no JSON: {error}") from error
        return dict(facts)

    def log_event(self, event: Event, time: float) -> None:
        """``time`` in seconds since 1970. Raises OSError."""
        if self._events is None:
            self._events = JsonLinesWriter(self.events_file)
        self._events.append({"time": time, **to_json(event)})

    def log_step(self, record: StepRecord) -> None:
        """The record, and before it in the ledger what the step read. Raises OSError."""
        if record.read:
            self._samples_writer().append(samples.to_json(record.step, record.read))
        self._step_writer().append(step_to_json(record))

    def log_plan(self, plan: Plan, time: float) -> None:
        """Who does what from about ``time`` (seconds since 1970) on. Raises OSError."""
        if self._plans is None:
            self._plans = JsonLinesWriter(self.plans_file)
        self._plans.append({"time": time, **plan_to_json(plan)})

    def log_books(self, ledger: Ledger, time: float) -> None:
        """Where the seconds went until ``time``, since this start of the run. Raises OSError."""
        if self._books is None:
            self._books = JsonLinesWriter(self.goodput_file)
        seconds = {cause: ns / 1e9 for cause, ns in ledger.nanoseconds.items() if ns}
        self._books.append({"time": time, "goodput": ledger.goodput, "seconds": seconds})

    def write_timeline(self, text: str) -> None:
        """Replaces the timeline. Raises OSError."""
        _replace(self.timeline_file, text, sync=False)

    def piece(self, name: str, offset: int) -> bytes | None:
        """What the file ``name`` holds from ``offset`` on, ``PIECE`` bytes at most; None where it is shorter
        than that or not there. Raises ValueError for a file that is not one of ``READABLE``."""
        if name not in READABLE:
            raise ValueError(f"{name!r} is no part of a run's record: read one of {', '.join(READABLE)}")
        try:
            with (self.path / name).open("rb") as stream:
                if os.fstat(stream.fileno()).st_size < offset:
                    return None
                stream.seek(offset)
                return stream.read(PIECE)
        except FileNotFoundError:
            return None

    def supersede_steps(self, version: int) -> None:
        """The run goes on from ``version`` completed steps: what was recorded of step ``version`` and
        later no longer holds. The lines stay in the file, the readers leave them out.
        """
        self._step_writer().append({_SUPERSEDED_FROM: version})
        if self.samples_file.exists():
            self._samples_writer().append({_SUPERSEDED_FROM: version})

    def read_events(self) -> EventLog:
        """Raises ValueError, naming file and line, for a line that is no event."""
        records, torn = read_json_lines(self.events_file)
        events = []
        for number, record in enumerate(records, start=1):
            try:
                time = float(record.pop("time"))
                events.append(LoggedEvent(time, from_json(record)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.events_file}, line {number} is no event: {error}") from error
        return EventLog(tuple(events), torn)

    def read_steps(self) -> StepLog:
        """The last record of each step that was not superseded. Raises ValueError, naming file and
        line, for a line that is no step.
        """
        steps, torn = _by_step(self.steps_file, _step, "step")
        return StepLog(tuple(steps[step] for step in sorted(steps)), torn)

    def read_samples(self) -> Mapping[int, samples.StepSamples]:
        """The ledger: what each step that was not superseded used. Empty where the data set tells nothing of
        it. Raises ValueError, naming file and line, for a line that does not belong there.
        """
        return _by_step(self.samples_file, samples.from_json, "record of samples")[0]

    def close(self) -> None:
        """Closes the logs; a later ``log_*`` opens them again. Idempotent."""
        for writer in (self._events, self._steps, self._samples, self._plans, self._books):
            if writer is not None:
                writer.close()
        self._events = self._steps = self._samples = self._plans = self._books = None

    def _step_writer(self) -> JsonLinesWriter:
        if self._steps is None:
            self._steps = JsonLinesWriter(self.steps_file)
        return self._steps

    def _samples_writer(self) -> JsonLinesWriter:
        if self._samples is None:
            self._samples = JsonLinesWriter(self.samples_file)
        return self._samples


def _step(record: Mapping[str, Any]) -> tuple[int, StepRecord]:
    parsed = step_from_json(record)
    return parsed.step, parsed


def _by_step(
    path: Path, parse: Callable[[Mapping[str, Any]], tuple[int, _Parsed]], what: str
) -> tuple[dict[int, _Parsed], str | None]:
    """The last line of each step that no later line takes back, and a sentence about a torn last line.

    Raises ValueError, naming file and line, for one that is no ``what``.
    """
    records, torn = read_json_lines(path)
    found: dict[int, _Parsed] = {}
    for number, record in enumerate(records, start=1):
        try:
            if _SUPERSEDED_FROM in record:
                first = int(record[_SUPERSEDED_FROM])
                found = {step: kept for step, kept in found.items() if step < first}
            else:
                step, parsed = parse(record)
                found[step] = parsed
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no {what}: {error}") from error
    return found, torn


def _replace(path: Path, text: str, *, sync: bool = True) -> None:
    """Whole or not at all; without ``sync`` a machine that loses its power may lose it too."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        if sync:
            os.fsync(stream.fileno())
    temporary.replace(path)
