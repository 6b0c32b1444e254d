"""Runs as Ray jobs: submitting them, following and stopping them, and asking things of them, all over
HTTP."""

from __future__ import annotations

import hashlib
import re
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

from actors.jobs import ENTRY_LINE, STOP_WAIT_VARIABLE, Jobs, JobState, follow
from jobs.exits import INTERRUPTED, RUN_ERROR, UNDER_WAY, USER_ERROR

Task = Literal["train", "curate"]

STOP_WAIT_SECONDS = 600
"""How long a run may take to come to a step boundary and write its checkpoint, unless told otherwise."""

RECONNECT_SECONDS = 120.0
"""How long the head may be away while a log is followed."""

ASK_SECONDS = 30.0
"""Likewise, while a question to a run is on its way."""

RUNS = "~/reknit-runs"
"""Where submitted runs are recorded, on the machine of the head."""

RUN, ASKED, TASK = "reknit_run", "reknit_asked", "reknit_task"
FOLDER, CHECKPOINTS, DIGEST = "reknit_folder", "reknit_checkpoints", "reknit_digest"
"""Metadata of a job: the name of its run's folder, the run that it asks something of, what it does, where it
writes, and what tells its command and recipe from others."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ENDED = re.compile(r"^step \d+  (completed|interrupted|failed) with ", re.MULTILINE)
_BEGAN = re.compile(r"^step \d+  ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be submitted, checked. ``environment`` and ``metadata`` are those of the job."""

    id: str
    entrypoint: str
    working_dir: Path
    environment: Mapping[str, str]
    metadata: Mapping[str, str]


def order(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    task: Task = "train",
    working_dir: str | Path = ".",
    entrypoint: str | None = None,
    environment: Sequence[str] = (),
    metadata: Sequence[str] = (),
    id: str | None = None,
    runs: str = RUNS,
    resume: str | None = None,
    stop_wait: int = STOP_WAIT_SECONDS,
) -> Order:
    """Checks everything that can be checked here, before anything is uploaded.

    ``environment`` and ``metadata`` are like ``KEY=VALUE``. ``entrypoint`` takes the place of the command
    that runs the recipe. ``resume``: the run in ``runs`` that is to go on. Raises ValueError for any mistake.
    """
    if task not in get_args(Task):
        raise ValueError(f"--task {task} is unknown: it is {' or '.join(get_args(Task))}")
    root = Path(working_dir).expanduser().absolute()
    if not root.is_dir():
        raise ValueError(f"{root} is no folder: name the one to upload by --working-dir")
    file = Path(recipe).expanduser().absolute()
    if not file.is_relative_to(root):
        raise ValueError(
            f"{file} lies outside the working directory {root}: put it there, or name another one"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))  # where the recipe's modules will be found on the cluster
    name, digest, checkpoints = _examined(task, file, overrides)
    if stop_wait < 1:
        raise ValueError(f"--stop-wait {stop_wait} leaves no time for a checkpoint: give at least 1 second")
    job = id or f"{name}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    for what in (job, resume or job):
        if not _ID.fullmatch(what):
            raise ValueError(f"{what!r} cannot name a run: use up to 100 letters, digits, '.', '_' and '-'")
    if resume and task != "train":
        raise ValueError("--resume is for training: a curation goes on where it was by itself")
    run = resume or job
    folder = f"{runs.rstrip('/')}/{run}"
    command = entrypoint or _command(task, file.relative_to(root), overrides, folder, resume is not None)
    variables = {STOP_WAIT_VARIABLE: str(stop_wait), **pairs(environment, "--env")}
    told = pairs(metadata, "--metadata")
    reserved = sorted(key for key in told if key.startswith("reknit_"))
    if reserved:
        raise ValueError(f"--metadata {reserved[0]} is one of Reknit's own: choose a key without reknit_")
    own = {RUN: run, TASK: task, FOLDER: folder, "reknit_recipe": str(file.relative_to(root))}
    if checkpoints is not None:
        own[CHECKPOINTS] = checkpoints
    own[DIGEST] = hashlib.sha256(f"{command}\n{digest}".encode()).hexdigest()
    return Order(job, command, root, variables, {**told, **own})


def _examined(task: Task, file: Path, overrides: Sequence[str]) -> tuple[str, str, str | None]:
    """A recipe's name, digest and checkpoint folder. Raises ValueError for its mistakes, the names of its
    builders among them."""
    if task == "curate":
        from jobs.curation.recipe import load_curation

        curation = load_curation(file, overrides)
        return "curate", hashlib.sha256(curation.model_dump_json().encode()).hexdigest(), None
    # only here: it takes seconds that the other commands need not wait
    from jobs.builders import load_builder
    from jobs.recipe.recipe import load_recipe

    recipe = load_recipe(file, overrides)
    for builder in (recipe.model.build, recipe.data.build):
        load_builder(builder)
    return recipe.run.name, recipe.digest(), recipe.checkpoint.folder


def _command(task: Task, recipe: Path, overrides: Sequence[str], folder: str, resume: bool) -> str:
    """``exec``: the signal of a stop reaches one process, which is the driver."""
    words = ["python", "-m", "jobs.cli", task, recipe.as_posix()]
    for override in overrides:
        words += ["--set", override]
    if task == "train":
        words += ["--run-folder", folder, *(["--resume"] if resume else [])]
    return "exec " + shlex.join(words)


def pairs(given: Sequence[str], option: str) -> dict[str, str]:
    """``KEY=VALUE`` each. Raises ValueError."""
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"{option} {text!r} is not of the form KEY=VALUE")
        found[key] = value
    return found


def submit(jobs: Jobs, order: Order) -> bool:
    """Starts the job; False if it was submitted before, under the same id. Raises ValueError if the id
    belongs to something else, or if a run under way writes to the same place."""
    earlier = jobs.find(order.id)
    if earlier is not None:
        if earlier.metadata.get(DIGEST) != order.metadata[DIGEST]:
            raise ValueError(
                f"{order.id} is the id of a job with another recipe or command: choose another --id"
            )
        return False
    for other in jobs.all():
        for key in (FOLDER, CHECKPOINTS):
            place = order.metadata.get(key)
            if not other.is_over and place is not None and other.metadata.get(key) == place:
                raise ValueError(
                    f"the run {other.id} is under way and writes to {place} too: stop it first, or name "
                    f"{'another --id' if key == FOLDER else 'another checkpoint.folder'}"
                )
    jobs.submit(
        order.id,
        order.entrypoint,
        working_dir=str(order.working_dir),
        excludes=("/runs",),
        environment=order.environment,
        metadata=order.metadata,
    )
    return True


def known(jobs: Jobs, run: str) -> JobState:
    """Raises ValueError if the cluster knows no such run."""
    state = jobs.find(run)
    if state is None:
        raise ValueError(
            f"the cluster at {jobs.address} knows no run {run}: `reknit list` shows those it knows"
        )
    return state


def runs_of(jobs: Jobs) -> list[JobState]:
    """The submitted runs, without what was only asked of them."""
    return [job for job in jobs.all() if ASKED not in job.metadata]


def exit_code(state: JobState) -> int:
    """What a script is told of a job."""
    match state.status:
        case "SUCCEEDED":
            return 0
        case "STOPPED":
            return INTERRUPTED
        case "FAILED":
            return state.exit_code if state.exit_code in (USER_ERROR, INTERRUPTED) else RUN_ERROR
        case _:
            return UNDER_WAY


def watch(
    jobs: Jobs,
    run: str,
    write: Callable[[str], object],
    *,
    patience: float = RECONNECT_SECONDS,
    skip: int = 0,
) -> JobState:
    """``actors.jobs.follow`` by this machine's clock."""
    return follow(jobs, run, write, patience=patience, clock=time.monotonic, sleep=time.sleep, skip=skip)


def stop(jobs: Jobs, run: str, write: Callable[[str], object]) -> str | None:
    """Stops a run and waits until it has ended. Returns what is wrong with how it ended, None if nothing is:
    it has written its checkpoint, had not begun, or had ended before."""
    state = known(jobs, run)
    if state.is_over:
        return None
    skip = len(jobs.log(run))
    jobs.stop(run)
    state = watch(jobs, run, write, skip=skip)
    return problem_of_stop(state, jobs.log(run))


def problem_of_stop(state: JobState, log: str) -> str | None:
    """As ``stop`` returns it. ``log`` is all that the run has printed."""
    if state.status == "FAILED":
        return f"{state.id} has failed meanwhile: {(state.message.splitlines() or ['see its log'])[0]}"
    is_training = state.metadata.get(TASK, "train") == "train"
    if state.status == "SUCCEEDED" or not is_training or _ENDED.search(log) or not _BEGAN.search(log):
        return None
    return (
        f"{state.id} was ended before it could write a checkpoint: submit it with a longer --stop-wait, and "
        "go on from the newest checkpoint by --resume"
    )


def ask(jobs: Jobs, run: str, words: Sequence[str]) -> str:
    """Has ``reknit WORDS`` called on the cluster, where RUN among them is the run's name there. Returns what
    it printed. Raises ValueError if the run is not under way or the answer is that it was a mistake."""
    state = known(jobs, run)
    if state.is_over:
        raise ValueError(f"the run {run} has ended ({state.status}): only one that is under way can be asked")
    name = state.metadata.get(RUN, run)
    words = [name if word == "RUN" else word for word in words]
    job = f"{run}-{words[0]}-{secrets.token_hex(4)}"
    jobs.submit(
        job,
        "exec " + shlex.join(["python", "-m", "jobs.cli", *words]),
        working_dir=state.working_dir,
        metadata={ASKED: run},
    )
    said: list[str] = []
    answer = watch(jobs, job, said.append, patience=ASK_SECONDS)
    lines = "".join(said).splitlines()
    first = next((number for number, line in enumerate(lines, 1) if ENTRY_LINE in line), 0)
    text = "\n".join(lines[first:]).strip()
    jobs.forget(job)
    if answer.status == "SUCCEEDED":
        return text
    mistake = next((line for line in lines if line.startswith("reknit: ")), "")
    raise ValueError(mistake.removeprefix("reknit: ") or f"the cluster could not ask {run}: {text[-500:]}")
