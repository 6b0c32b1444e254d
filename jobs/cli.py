"""The command line, ``reknit``. Mistakes end with one sentence and exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli_jobs import jobs_app
from jobs.cli_plan import plan_app
from jobs.cli_watch import watch_app
from jobs.exits import INTERRUPTED, RUN_ERROR
from jobs.exits import errors as _errors
from jobs.terminal import plain_console

app = typer.Typer(
    name="reknit",
    help="Trains on a Ray cluster whose machines come and go; the loss curve stays the same, bit for bit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(jobs_app)
app.add_typer(watch_app)
app.add_typer(plan_app)

RecipePath = Annotated[Path, typer.Argument(help="The recipe (a TOML file).")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides a value of the recipe.")
]


@app.command()
def train(
    recipe: RecipePath,
    settings: Settings = None,
    address: Annotated[
        str | None, typer.Option(help="Joins the Ray cluster there; without it a local one is started.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Goes on from the newest whole checkpoint.")
    ] = False,
    run_folder: Annotated[
        Path | None, typer.Option(help="Where the run is recorded (default: runs/<name>-<time>).")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="The run goes on if this command dies; `reknit attach` shows it.")
    ] = False,
) -> None:
    """Trains a recipe."""
    with _errors():
        from jobs.train import train as run

        result = run(
            recipe, settings or (), address=address, resume=resume, run_folder=run_folder, detach=detach
        )
    if result.outcome != "completed":
        raise typer.Exit(INTERRUPTED)


RunFolderPath = Annotated[Path, typer.Argument(help="A run's folder.")]


@app.command()
def attach(run: RunFolderPath) -> None:
    """Shows a detached run that is under way; Ctrl-C lets go of it."""
    with _errors():
        from jobs.train import attach as follow

        result = follow(run)
    if result.outcome != "completed":
        raise typer.Exit(INTERRUPTED)


@app.command()
def verify(
    run: RunFolderPath,
) -> None:
    """Recomputes a run in one plain PyTorch process and compares every bit."""
    with _errors():
        from jobs.verify import verify as check

        same = check(run, plain_console())
    if not same:
        raise typer.Exit(RUN_ERROR)


@app.command()
def captions(
    run: RunFolderPath,
    baseline: Annotated[
        Path | None,
        typer.Option(help="A run of the same recipe with data.arguments.images=false, to compare with."),
    ] = None,
) -> None:
    """Writes a page of held-out images with a captioner's captions, and says what seeing is worth."""
    with _errors():
        from jobs.captions.page import write_page

        write_page(run, baseline, plain_console())


@app.command()
def chaos(
    recipe: RecipePath,
    minutes: Annotated[float, typer.Option(help="How long it lasts.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Decides what is done and when.")] = 0,
    settings: Settings = None,
    run_folder: Annotated[
        Path | None, typer.Option(help="Where the run is recorded (default: runs/<name>-chaos-<time>).")
    ] = None,
) -> None:
    """Trains while workers and nodes are killed, stopped, drained and added, and compares the bits."""
    with _errors():
        from jobs.chaos import chaos as run

        same = run(recipe, minutes, seed, plain_console(), settings or (), run_folder=run_folder)
    if not same:
        raise typer.Exit(RUN_ERROR)


@app.command()
def curate(
    recipe: RecipePath,
    settings: Settings = None,
    address: Annotated[
        str | None, typer.Option(help="Joins the Ray cluster there; without it a local one is started.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="CPUs of the local Ray (default: all); the set's bits stay the same.")
    ] = None,
) -> None:
    """Makes a data set of images, captions and speech, goes on where it was interrupted."""
    with _errors():
        from jobs.curate import curate as run

        run(recipe, settings or (), address=address, workers=workers, console=plain_console())


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Which one; an unknown name lists them all.")],
    json: Annotated[Path | None, typer.Option("--json", help="Writes the figures there too.")] = None,
) -> None:
    """Measures, prints a table and says whether the goal is met."""
    with _errors():
        from jobs.bench.report import run_bench
        from jobs.terminal import table_console

        run_bench(name, json, table_console())


@app.command()
def simulate(
    workers: Annotated[
        int | None, typer.Option(help="Plays a trace of lost machines to a cluster of that size.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="The trace, a CSV file (default: a sample of a spot cluster).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Draws the trace from a seed; or the first seed of the schedules.")
    ] = None,
    workers_per_node: Annotated[int, typer.Option(help="With --workers: how many share a machine.")] = 8,
    schedules: Annotated[
        int | None, typer.Option(help="Runs so many random schedules of faults on small clusters.")
    ] = None,
    replay: Annotated[
        int | None, typer.Option(help="Shows all that happens in the schedule of a seed.")
    ] = None,
) -> None:
    """Has the real controller and planner deal with faults on a simulated cluster."""
    with _errors():
        from jobs.schedules import replay as show
        from jobs.schedules import run_schedules
        from jobs.simulate import simulate as play

        if sum(what is not None for what in (workers, schedules, replay)) != 1:
            raise ValueError("give one of --workers, --schedules and --replay")
        well = True
        if workers is not None:
            play(workers, trace, seed, workers_per_node=workers_per_node)
        elif schedules is not None:
            well = not run_schedules(schedules, seed or 0)
        elif replay is not None:
            well = show(replay)
    if not well:
        raise typer.Exit(RUN_ERROR)


@app.command()
def schedule(
    name: Annotated[str, typer.Argument(help="Which one; an unknown name lists them all.")],
    stages: Annotated[int, typer.Option(help="Workers in a row.")] = 4,
    micro_batches: Annotated[int, typer.Option(help="Of one step.")] = 16,
    chunks: Annotated[int, typer.Option(help="Stages that every worker holds.")] = 1,
    seconds: Annotated[
        tuple[float, float, float],
        typer.Option(metavar="F I W", help="Forward, input gradient, weight gradient of a micro-batch."),
    ] = (1.0, 1.0, 1.0),
    taken: Annotated[int | None, typer.Option(help="Stages each micro-batch passes (skippipe).")] = None,
    swaps: Annotated[int | None, typer.Option(help="How many of them may come late.")] = None,
    room: Annotated[int | None, typer.Option(help="Micro-batches a worker can keep activations of.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Draws it there.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Writes who computes what when there.")] = None,
) -> None:
    """Simulates a step of a schedule: its bubble, its activations and a picture."""
    with _errors():
        from jobs.timeline import show_schedule
        from strategies.schedules.simulation import StageSeconds

        show_schedule(
            name,
            stages,
            micro_batches,
            chunks,
            StageSeconds(*seconds),
            plain_console(),
            svg=svg,
            spans=json,
            room=room,
            taken=taken,
            swaps=swaps,
        )


@app.command()
def serve(
    run: RunFolderPath,
    checkpoint: Annotated[
        int | None,
        typer.Option(help="Serves this step's (default: the newest, and newer ones as they come)."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 lets other machines ask.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen; 0 takes any free one.")] = 8000,
    replicas: Annotated[
        tuple[int, int], typer.Option(metavar="LEAST MOST", help="Scales between so many by the load.")
    ] = (1, 1),
    queue: Annotated[int, typer.Option(help="How many may wait before others are told to come later.")] = 128,
    threads: Annotated[int, typer.Option(help="Compute threads of a replica.")] = 1,
    max_request_mb: Annotated[int, typer.Option(help="The largest request.")] = 16,
    silence_seconds: Annotated[
        float,
        typer.Option(help="A replica without a sign of life for so long has hung: another one goes on."),
    ] = 10.0,
    address: Annotated[
        str | None, typer.Option(help="Joins the Ray cluster there; without it a local one is started.")
    ] = None,
) -> None:
    """Answers over HTTP with a run's newest checkpoint; $REKNIT_SERVE_TOKEN is the bearer token."""
    with _errors():
        from jobs.serve import serve as answer

        answer(
            run,
            checkpoint=checkpoint,
            host=host,
            port=port,
            replicas=replicas,
            queue=queue,
            threads=threads,
            most_bytes=max_request_mb << 20,
            silence_seconds=silence_seconds,
            address=address,
        )


checkpoint = typer.Typer(help="Takes checkpoints from one engine or system to another.", no_args_is_help=True)
app.add_typer(checkpoint, name="checkpoint")


@checkpoint.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A DeepSpeed universal checkpoint, or a run's folder.")],
    recipe: RecipePath,
    run_folder: Annotated[Path, typer.Option(help="The run's folder that is made.")],
    settings: Settings = None,
    step: Annotated[int | None, typer.Option(help="Steps behind it, where its files do not say.")] = None,
) -> None:
    """Makes a run of a recipe that goes on from a checkpoint: `reknit train --resume --run-folder ...`."""
    with _errors():
        from jobs.recipe.recipe import load_recipe
        from jobs.universal import import_checkpoint

        version = import_checkpoint(source, load_recipe(recipe, settings or ()), run_folder, step=step)
        plain_console().print(f"{run_folder} goes on from step {version}", highlight=False, soft_wrap=True)


@checkpoint.command()
def export(
    run: RunFolderPath,
    target: Annotated[Path, typer.Argument(help="The folder that is written.")],
    version: Annotated[int | None, typer.Option("--step", help="Which one (default: the newest).")] = None,
) -> None:
    """Writes a run's checkpoint as a DeepSpeed universal checkpoint."""
    with _errors():
        from jobs.universal import export_checkpoint

        found = export_checkpoint(run, target, version=version)
        plain_console().print(f"step {found} exported to {target}", highlight=False, soft_wrap=True)


@app.command()
def monitoring(
    output: Annotated[Path, typer.Option(help="The folder that is written.")] = Path("monitoring"),
    targets: Annotated[
        Path | None, typer.Option(help="Where runs say that they are: a recipe's metrics.targets.")
    ] = None,
    serve_token_file: Annotated[
        Path | None, typer.Option(help="A file that holds the bearer token of services.")
    ] = None,
) -> None:
    """Writes settings, dashboards and alerts for a Prometheus and a Grafana that find this user's runs."""
    with _errors():
        from jobs.monitoring import monitoring as write

        write(output, targets=targets, token=serve_token_file)


k8s = typer.Typer(help="Runs recipes on Kubernetes.", no_args_is_help=True)
app.add_typer(k8s, name="k8s")


def _pair(option: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{option} {text}: write it as key=value, such as cloud.google.com/gke-spot=true")
    return key, value


@k8s.command()
def render(
    recipe: RecipePath,
    image: Annotated[str, typer.Option(help="The image that every pod runs, with a tag or a digest.")],
    settings: Settings = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder that is written (default: deploy/<name>).")
    ] = None,
    namespace: Annotated[str, typer.Option(help="Where everything is put.")] = "reknit",
    workers_per_pod: Annotated[int, typer.Option(help="A pod is a failure domain.")] = 1,
    reserved: Annotated[
        int | None, typer.Option(help="Pods on reserved machines (default: those of the least workers).")
    ] = None,
    memory_gib: Annotated[float, typer.Option(help="One worker's.")] = 4.0,
    accelerator: Annotated[str, typer.Option(help="The resource that a GPU is.")] = "nvidia.com/gpu",
    reserved_nodes: Annotated[
        str, typer.Option(metavar="KEY=VALUE", help="The label of reserved machines.")
    ] = "reknit.dev/capacity=reserved",
    spot_nodes: Annotated[
        str, typer.Option(metavar="KEY=VALUE", help="The label of spot machines, and their taint.")
    ] = "reknit.dev/capacity=spot",
    pods: Annotated[
        tuple[int, int] | None, typer.Option(metavar="LEAST MOST", help="Pods that curate (default: 1 4).")
    ] = None,
    cpus: Annotated[int | None, typer.Option(help="CPUs of a pod that curates (default: 4).")] = None,
) -> None:
    """Writes a recipe's manifests, for `kubectl apply -k`."""
    with _errors():
        from jobs.kubernetes import render as write
        from jobs.pods import Machines

        machines = Machines(
            image=image,
            workers_per_pod=workers_per_pod,
            reserved=reserved,
            memory_gib=memory_gib,
            accelerator=accelerator,
            reserved_label=_pair("--reserved-nodes", reserved_nodes),
            spot_label=_pair("--spot-nodes", spot_nodes),
        )
        write(recipe, machines, settings or (), output=output, pods=pods, cpus=cpus, namespace=namespace)


def main() -> None:
    """The console script."""
    app()


def train_alone() -> None:
    """``python -m jobs.train``: the same as ``reknit train``."""
    alone: Callable[..., None] = train
    typer.run(alone)


if __name__ == "__main__":
    main()
