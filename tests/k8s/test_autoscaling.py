"""Ray's real autoscaler brings and takes the pods of a run that trains on: as many as are of use to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.forming import nodes_may_come
from jobs.recipe.recipe import Recipe
from runtime.events import DrainNotice, Recovered, Resized, RunStarted, WorkerJoined, WorkerLeft, WorkerLost
from runtime.plan import WorkerId
from runtime.run_folder import RunFolder
from tests.support.kubernetes.lab import ApiServer, Lab, ray_on_kubernetes
from tests.support.ray_jobs import toy_recipe, wait_until
from tests.support.watched import FOR_EVER, Expected, Watched, start

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

POD_SECONDS = 240.0
"""How long a new pod's worker may take to be at work on a machine that is busy with other things."""

USEFUL = 3
"""So many of five micro-batches' workers have two at most; a fourth would leave it at that."""


def recipe() -> Recipe:
    """Begins with one worker and may have four."""
    return toy_recipe(
        "autoscaled",
        FOR_EVER,
        1,
        1,
        data={"build": "tests.support.toys:build_paced_tokens", "arguments": {"seconds": 0.1}},
        parallel={
            "workers": 1,
            "max_workers": USEFUL + 1,
            "stages": 1,
            "micro_batches": 5,
            "micro_batch_size": 2,
            "cpus_per_worker": 1,
        },
        detection={"silence_seconds": 5.0, "stuck_seconds": 60.0},
    )


def test_pods_come_and_go_and_the_bits_stay(tmp_path: Path, api_server: ApiServer) -> None:
    asked = recipe()
    with ray_on_kubernetes(api_server, reserved=1, spot=USEFUL) as lab, start(tmp_path, asked) as run:
        watched = Watched(run, RunFolder(tmp_path), Expected(asked))
        (began,) = watched.until(lambda: watched.events(RunStarted), "the start", POD_SECONDS)
        assert began.workers == 1
        grown = members(watched, USEFUL)
        assert nodes_may_come(), "the autoscaler has reported itself"
        assert sorted(lab.pods().values()) == ["reserved", "spot", "spot"]
        assert len(set(run.domains().values())) == USEFUL, "each is on a pod of its own"

        victim, lost = on_spot(watched, lab, grown)
        lab.kubelet.lose(lost)
        watched.heard(WorkerLost, victim)
        watched.until(lambda: any(victim in e.lost for e in watched.events(Recovered)), "the recovery")
        left = tuple(worker for worker in grown if worker != victim)

        leaver, told = on_spot(watched, lab, left)
        lab.api.pods.delete(told)
        notice = watched.heard(DrainNotice, leaver)
        assert "drained" in notice.reason and notice.deadline is not None
        watched.heard(WorkerLeft, leaver)
        regrown = members(watched, USEFUL)
        assert not {victim, leaver} & set(regrown) and not {lost, told} & set(lab.pods())

        run.resize(1)
        watched.until(lambda: watched.events(Resized), "the wish")
        members(watched, 1)
        wait_until(lambda: list(lab.pods().values()) == ["reserved"], "the spot pods are given back")
        watched.goes_on(3)
        # one on its way may be lost too: Ray takes seconds to see that a node is gone
        at_work = {event.worker for event in watched.events(WorkerLost) if not event.idle}
        assert at_work == {victim} and len(watched.events(Recovered)) == 1, "nobody else was lost"
        assert len(watched.events(WorkerJoined)) == USEFUL - 1 + 2, "two were replaced, and no other came"
        run.stop()
        assert run.wait(60.0)
        watched.assert_same_bits()


def members(watched: Watched, count: int) -> tuple[WorkerId, ...]:
    """Who has work, once they are ``count`` and the run goes on."""

    def as_many() -> bool:
        plan = watched.run.plan()
        return plan is not None and len(plan.workers) == count

    watched.until(as_many, f"{count} workers", POD_SECONDS)
    watched.goes_on(3)
    return watched.plan().workers


def on_spot(watched: Watched, lab: Lab, workers: tuple[WorkerId, ...]) -> tuple[WorkerId, str]:
    """A worker on a spot pod, and the pod."""
    processes, groups = watched.run.processes(), lab.pods()
    placed = {worker: pod_of(processes[worker]) for worker in workers}
    return next((worker, pod) for worker, pod in placed.items() if groups[pod] == "spot")


def pod_of(process: int) -> str:
    """The pod's name, as its containers' processes have it in their environment."""
    entries = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    found = next(entry for entry in entries if entry.startswith(b"RAY_CLOUD_INSTANCE_ID="))
    return found.partition(b"=")[2].decode()
