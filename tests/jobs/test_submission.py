"""What is checked before anything is uploaded, what a job is made of, and what scripts are told."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.jobs import JobState
from jobs import submission
from jobs.cli import app
from jobs.submission import ASKED, CHECKPOINTS, RUN, Order, ask, exit_code, problem_of_stop, submit
from runtime.events import CheckpointWritten, RunFinished, RunStarted
from runtime.sentences import sentence
from tests.support.ray_jobs import toy_recipe


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy.toml").write_text(toy_recipe("toy", 5, 2, 1).to_toml())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def order(**changes: Any) -> Order:
    return submission.order("toy.toml", **changes)


def test_a_job_is_the_recipes_command_in_the_uploaded_folder(folder: Path) -> None:
    made = order(id="nightly", overrides=["run.steps=7"], environment=["A=b=c"], metadata=["team=x"])
    assert shlex.split(made.entrypoint) == [
        *("exec", "python", "-m", "jobs.cli", "train", "toy.toml"),
        *("--set", "run.steps=7", "--run-folder", "~/reknit-runs/nightly"),
    ]
    assert made.working_dir == folder
    assert made.environment == {"RAY_JOB_STOP_WAIT_TIME_S": "600", "A": "b=c"}
    assert made.metadata["team"] == "x" and made.metadata[RUN] == "nightly"


def test_the_stop_wait_can_be_chosen(folder: Path) -> None:
    assert order(stop_wait=30).environment["RAY_JOB_STOP_WAIT_TIME_S"] == "30"


def test_without_an_id_every_order_has_one_of_its_own(folder: Path) -> None:
    first, second = order(), order()
    assert first.id != second.id and first.id.startswith("toy-")


def test_a_resumed_run_keeps_its_folder_under_another_id(folder: Path) -> None:
    made = order(id="b", resume="a", runs="/data/")
    assert made.id == "b" and made.metadata[RUN] == "a"
    assert made.entrypoint.endswith("--run-folder /data/a --resume")


def test_what_a_shell_would_change_is_quoted(folder: Path) -> None:
    assert "'checkpoint.folder=a b;c'" in order(overrides=["checkpoint.folder=a b;c"]).entrypoint


def test_another_entry_point_takes_the_commands_place(folder: Path) -> None:
    assert order(entrypoint="./own.sh").entrypoint == "./own.sh"


def test_a_curation_is_submitted_likewise(folder: Path) -> None:
    Path("set.toml").write_text('[set]\nname = "x"\nfolder = "sets/x"\n[source]\nkind = "tuxpaint"\n')
    made = submission.order("set.toml", task="curate", id="set")
    assert made.entrypoint == "exec python -m jobs.cli curate set.toml"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"overrides": ["run.stepz=7"]}, "stepz"),
        ({"overrides": ["model.build=nowhere.at.all:build"]}, "there is no module nowhere"),
        ({"overrides": ["data.build=tests.support.models:nothing"]}, "has no nothing"),
        ({"working_dir": "missing"}, "is no folder"),
        ({"environment": ["AB"]}, "--env 'AB' is not of the form KEY=VALUE"),
        ({"metadata": ["=b"]}, "--metadata '=b' is not of the form KEY=VALUE"),
        ({"metadata": ["reknit_run=b"]}, "--metadata reknit_run is one of Reknit's own"),
        ({"id": "a/b"}, "'a/b' cannot name a run"),
        ({"resume": "../x"}, "'../x' cannot name a run"),
        ({"stop_wait": 0}, "--stop-wait 0 leaves no time"),
        ({"task": "serve"}, "--task serve is unknown: it is train or curate"),
    ],
)
def test_mistakes_are_told_before_anything_is_uploaded(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        order(**changes)


def test_a_recipe_outside_the_working_directory_is_refused(folder: Path) -> None:
    (folder / "sub").mkdir()
    with pytest.raises(ValueError, match="lies outside the working directory"):
        order(working_dir="sub")


class Cluster:
    """``Jobs`` in memory."""

    address = "http://head:8265"

    def __init__(self, *states: JobState) -> None:
        self.states = {state.id: state for state in states}
        self.submitted: list[tuple[str, str, dict[str, Any]]] = []
        self.answer = JobState("", "SUCCEEDED", "")
        self.said = ""
        self.forgotten: list[str] = []

    def find(self, job: str) -> JobState | None:
        return self.states.get(job)

    def all(self) -> list[JobState]:
        return list(self.states.values())

    def submit(self, job: str, entrypoint: str, **details: Any) -> None:
        self.submitted.append((job, entrypoint, details))
        metadata = details.get("metadata", {})
        self.states[job] = replace(self.answer, id=job, entrypoint=entrypoint, metadata=metadata)

    def tail(self, job: str) -> Iterator[str]:
        yield self.said

    def log(self, job: str) -> str:
        return self.said

    def forget(self, job: str) -> None:
        self.forgotten.append(job)


def on(cluster: Cluster) -> Any:
    return cluster


def test_the_same_id_again_starts_nothing(folder: Path) -> None:
    cluster = Cluster()
    assert submit(on(cluster), order(id="a")) is True
    assert submit(on(cluster), order(id="a")) is False
    assert [job for job, _, _ in cluster.submitted] == ["a"]
    assert cluster.submitted[0][2]["excludes"] == ("/runs",), "earlier runs are not uploaded"


@pytest.mark.parametrize(
    "change", [{"overrides": ["run.steps=6"]}, {"entrypoint": "true"}, {"runs": "/data"}]
)
def test_the_same_id_for_something_else_is_refused(folder: Path, change: dict[str, Any]) -> None:
    cluster = Cluster()
    submit(on(cluster), order(id="a"))
    with pytest.raises(ValueError, match="a is the id of a job with another recipe or command"):
        submit(on(cluster), order(id="a", **change))


def test_an_id_of_somebody_elses_job_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="another recipe or command"):
        submit(on(Cluster(JobState("a", "RUNNING", "sleep 9"))), order(id="a"))


def test_two_runs_under_way_never_write_to_the_same_place(folder: Path) -> None:
    cluster = Cluster()
    cluster.answer = JobState("", "RUNNING", "")
    submit(on(cluster), order(id="a", overrides=["checkpoint.folder=/c"]))
    submit(on(cluster), order(id="b"))
    with pytest.raises(ValueError, match="the run a is under way and writes to /c too"):
        submit(on(cluster), order(id="c", overrides=["checkpoint.folder=/c"]))
    with pytest.raises(ValueError, match="the run b is under way and writes to ~/reknit-runs/b too"):
        submit(on(cluster), order(id="c", resume="b"))
    cluster.states = {job: replace(state, status="STOPPED") for job, state in cluster.states.items()}
    assert submit(on(cluster), order(id="c", resume="b", overrides=["checkpoint.folder=/c"]))
    assert cluster.states["c"].metadata[CHECKPOINTS] == "/c"


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 7, 1),
        ("FAILED", None, 1),
        ("FAILED", 2, 2),
        ("FAILED", 130, 130),
        ("STOPPED", None, 130),
        ("PENDING", None, 3),
        ("RUNNING", None, 3),
    ],
)
def test_exit_codes(status: Any, driver: int | None, code: int) -> None:
    assert exit_code(JobState("a", status, "", exit_code=driver)) == code


STARTED = sentence(RunStarted("a", 80, 4, 2)) + "\n"
WRITTEN = sentence(CheckpointWritten(7, 1000, 0.1)) + "\n"


def ended(outcome: Any) -> str:
    return sentence(RunFinished(outcome, 7, 4, 10.0, 0.5, "why")) + "\n"


@pytest.mark.parametrize(
    ("log", "well"),
    [
        ("Running entrypoint\n", True),  # it had not begun
        (STARTED + WRITTEN + ended("interrupted"), True),
        (STARTED + ended("completed"), True),
        (STARTED, False),
        (STARTED + WRITTEN, False),  # an earlier checkpoint
    ],
)
def test_a_stop_that_came_too_late_is_told(log: str, well: bool) -> None:
    problem = problem_of_stop(JobState("a", "STOPPED", ""), log)
    assert (problem is None) == well
    assert well or "longer --stop-wait" in str(problem)


def test_a_run_that_failed_while_it_was_stopped_is_told() -> None:
    assert "has failed meanwhile: why" in str(
        problem_of_stop(JobState("a", "FAILED", "", "why\nmore"), STARTED)
    )
    assert problem_of_stop(JobState("a", "SUCCEEDED", ""), STARTED) is None


def test_a_question_is_a_job_of_its_own_in_the_runs_own_folder() -> None:
    run = JobState("b", "RUNNING", "", working_dir="gcs://x.zip", metadata={RUN: "a"})
    cluster = Cluster(run)
    cluster.said = "Runtime env\nRunning entrypoint for job b-resize: exec\na is to have 3 workers\n"
    assert ask(on(cluster), "b", ["resize", "RUN", "3"]) == "a is to have 3 workers"
    ((job, entrypoint, details),) = cluster.submitted
    assert entrypoint == "exec python -m jobs.cli resize a 3"
    assert details == {"working_dir": "gcs://x.zip", "metadata": {ASKED: "b"}}
    assert cluster.forgotten == [job]
    assert [state.id for state in submission.runs_of(on(cluster))] == ["b"], "it is not listed as a run"


def test_a_mistake_in_a_question_comes_back_as_a_sentence() -> None:
    cluster = Cluster(JobState("a", "RUNNING", ""))
    cluster.answer, cluster.said = (
        JobState("", "FAILED", "", exit_code=2),
        "noise\nreknit: worker 9 has no work\n",
    )
    with pytest.raises(ValueError, match=r"^worker 9 has no work$"):
        ask(on(cluster), "a", ["drain", "RUN", "9"])


def test_a_run_that_has_ended_is_not_asked() -> None:
    with pytest.raises(ValueError, match=r"the run a has ended \(STOPPED\)"):
        ask(on(Cluster(JobState("a", "STOPPED", ""))), "a", ["drain", "RUN", "9"])
    with pytest.raises(ValueError, match="knows no run b"):
        ask(on(Cluster()), "b", ["drain", "RUN", "9"])


@pytest.mark.parametrize(
    "words",
    [["status", "a"], ["logs", "a"], ["stop", "a"], ["list"], ["resize", "a", "2"], ["drain", "a", "1"]],
)
def test_every_command_tells_of_an_address_where_nobody_is(words: list[str]) -> None:
    result = CliRunner().invoke(app, [*words, "--address", "http://127.0.0.1:1"])
    assert result.exit_code == 2
    assert result.output.startswith("reknit: no Ray cluster answers at http://127.0.0.1:1")
    assert len(result.output.splitlines()) == 1


def test_a_recipes_mistake_comes_before_the_address(folder: Path) -> None:
    words = ["submit", "toy.toml", "--set", "run.steps=0", "--address", "http://127.0.0.1:1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "run.steps" in result.output and len(result.output.splitlines()) == 1
