"""The commands for runs on a Ray cluster, from submitting one to stopping it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.exits import CONTACT_LOST, INTERRUPTED, RUN_ERROR, errors
from runtime.settings import dashboard_address, is_url, ray_address

if TYPE_CHECKING:
    from actors.jobs import Jobs, JobState

jobs_app = typer.Typer()

Address = Annotated[
    str | None, typer.Option(help="The dashboard of the cluster's head, such as http://HEAD:8265.")
]
RunName = Annotated[str, typer.Argument(help="The run's name, as `submit` prints it.")]
AnyRun = Annotated[str, typer.Argument(help="The run's name, or the folder of one that was not submitted.")]
AsJson = Annotated[bool, typer.Option("--json", help="For scripts.")]


@contextmanager
def _errors() -> Iterator[None]:
    from actors.jobs import ContactLost

    with errors():
        try:
            yield
        except ContactLost as error:
            typer.echo(f"reknit: {error}; what goes on there goes on without this command", err=True)
            raise typer.Exit(CONTACT_LOST) from None


def _jobs(address: str | None) -> Jobs:
    from actors.jobs import Jobs

    return Jobs(address or dashboard_address())


def _write(text: str) -> None:
    typer.echo(text, nl=False)


@jobs_app.command()
def submit(
    recipe: Annotated[Path, typer.Argument(help="The recipe (a TOML file) in the working directory.")],
    address: Address = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides a value of the recipe.")
    ] = None,
    task: Annotated[str, typer.Option(help="What is done with the recipe: train or curate.")] = "train",
    working_dir: Annotated[
        Path, typer.Option(help="Uploaded (without what .gitignore names), and where the job starts.")
    ] = Path("."),
    entrypoint: Annotated[
        str | None, typer.Option(help="Another shell command instead of the one that runs the recipe.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Environment of driver and workers.")
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Stored with the job.")
    ] = None,
    id: Annotated[
        str | None, typer.Option("--id", help="The run's name; submitting it again starts nothing.")
    ] = None,
    runs: Annotated[
        str, typer.Option(help="Where runs are recorded: a folder that the cluster's machines share.")
    ] = "~/reknit-runs",
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Goes on with an earlier run's newest checkpoint.")
    ] = None,
    stop_wait: Annotated[
        int, typer.Option(help="Seconds that a stop leaves the run for its checkpoint.")
    ] = 600,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Returns when the job is submitted.")] = False,
) -> None:
    """Submits a recipe to a Ray cluster as a job, and shows its log until it has ended."""
    with _errors():
        from jobs import submission

        order = submission.order(
            recipe,
            settings or (),
            task=task,  # type: ignore[arg-type]  # checked there
            working_dir=working_dir,
            entrypoint=entrypoint,
            environment=env or (),
            metadata=metadata or (),
            id=id,
            runs=runs,
            resume=resume,
            stop_wait=stop_wait,
        )
        jobs = _jobs(address)
        new = submission.submit(jobs, order)
        typer.echo(f"{'submitted' if new else 'submitted before'}: {order.id}")
        if no_wait:
            return
        _follow(jobs, order.id)


def _follow(jobs: Jobs, run: str) -> None:
    from jobs import submission

    try:
        state = submission.watch(jobs, run, _write)
    except KeyboardInterrupt:
        typer.echo(
            f"\n{run} goes on: `reknit logs -f {run}` shows it again, `reknit stop {run}` stops it", err=True
        )
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(f"{run}: {state.status}", err=True)
    raise typer.Exit(submission.exit_code(state))


@jobs_app.command()
def status(run: RunName, address: Address = None, as_json: AsJson = False) -> None:
    """Tells how a run stands: exit code 0 it succeeded, 1 it failed, 3 it is under way, 130 it was
    stopped."""
    with _errors():
        from jobs import submission

        jobs = _jobs(address)
        state = submission.known(jobs, run)
        if as_json:
            typer.echo(json.dumps(_facts(state), indent=2))
        else:
            lines = [line for line in jobs.log(run).splitlines() if line.strip()]
            facts = {**_facts(state), "newest": lines[-1] if lines else None}
            for name, value in facts.items():
                if isinstance(value, dict):
                    value = " ".join(f"{key}={text}" for key, text in value.items())
                if value not in (None, ""):
                    typer.echo(f"{name:<11} {value}")
    raise typer.Exit(submission.exit_code(state))


@jobs_app.command()
def logs(
    run: RunName,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until it has ended; exit code as of `status`.")
    ] = False,
) -> None:
    """Shows what a run has printed."""
    with _errors():
        from jobs import submission

        jobs = _jobs(address)
        submission.known(jobs, run)
        if follow:
            _follow(jobs, run)
        _write(jobs.log(run))


@jobs_app.command()
def stop(
    run: RunName,
    address: Address = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Does not wait for the end.")] = False,
) -> None:
    """Stops a run at the next step boundary, with a checkpoint."""
    with _errors():
        from jobs import submission

        jobs = _jobs(address)
        if no_wait:
            submission.known(jobs, run)
            jobs.stop(run)
            return
        problem = submission.stop(jobs, run, _write)
        typer.echo(f"{run}: {submission.known(jobs, run).status}", err=True)
    if problem is not None:
        typer.echo(f"reknit: {problem}", err=True)
        raise typer.Exit(RUN_ERROR)


@jobs_app.command("list")
def list_runs(address: Address = None, as_json: AsJson = False) -> None:
    """Lists the runs that were submitted to a cluster."""
    with _errors():
        from jobs import submission

        states = submission.runs_of(_jobs(address))
        if as_json:
            typer.echo(json.dumps([_facts(state) for state in states], indent=2))
            return
        rows = [("run", "status", "started", "seconds", "recipe")] + [_row(state) for state in states]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@jobs_app.command()
def resize(
    run: AnyRun,
    workers: Annotated[int, typer.Argument(help="How many it is to have from now on.")],
    address: Address = None,
) -> None:
    """Has a run get more workers, or do with fewer, within what its recipe allows."""
    with _errors():
        if _is_here(run, address):
            from jobs.control import resize as ask

            ask(run, workers)
            typer.echo(f"{run} is to have {workers} worker{'' if workers == 1 else 's'}")
        else:
            _ask(address, run, ["resize", "RUN", str(workers)])


@jobs_app.command()
def drain(
    run: AnyRun,
    target: Annotated[
        str, typer.Argument(metavar="WORKER|NODE", help="A worker's number, or the id of a Ray node.")
    ],
    deadline: Annotated[float | None, typer.Option(help="Seconds until it is taken away.")] = None,
    address: Address = None,
) -> None:
    """Has a worker, or all on a node, leave at the next step boundary, with no work lost."""
    with _errors():
        if _is_here(run, address):
            from jobs.control import drain as ask

            told = ask(run, target, deadline)
            typer.echo(f"{'worker' if len(told) == 1 else 'workers'} {', '.join(map(str, told))} to leave")
        else:
            within = [] if deadline is None else ["--deadline", str(deadline)]
            _ask(address, run, ["drain", "RUN", target, *within])


def _is_here(run: str, address: str | None) -> bool:
    """Whether the run can be reached without the dashboard: by its folder, or on the cluster that this
    process is part of."""
    if address is not None:
        return False
    from runtime.run_folder import RunFolder

    here = ray_address()
    return RunFolder(run).exists() or (here is not None and not is_url(here))


def _ask(address: str | None, run: str, words: Sequence[str]) -> None:
    from jobs import submission

    typer.echo(submission.ask(_jobs(address), run, words))


def _facts(state: JobState) -> dict[str, Any]:
    return {
        "run": state.id,
        "status": state.status,
        "started": _clock(state.started),
        "ended": _clock(state.ended),
        "exit_code": state.exit_code,
        "message": (state.message.splitlines() or [""])[0],
        "entrypoint": state.entrypoint,
        "metadata": {key: value for key, value in state.metadata.items() if key != "reknit_digest"},
    }


def _clock(seconds: float | None) -> str | None:
    return None if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def _row(state: JobState) -> tuple[str, str, str, str, str]:
    took = "" if state.started is None else f"{(state.ended or time.time()) - state.started:.0f}"
    recipe = state.metadata.get("reknit_recipe", "")
    return state.id, state.status, _clock(state.started) or "", took, recipe
