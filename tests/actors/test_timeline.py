"""A whole run in one process leaves its timeline, its plans and its goodput in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.events import Recovered
from runtime.run_folder import RunFolder, read_json_lines
from runtime.spans import KINDS
from strategies.job import Fault
from tests.support.cluster import LocalRun, run_toy, toy_job


def timeline(path: Path) -> dict[int, dict[str, Any]]:
    lines, torn = read_json_lines(RunFolder(path).timeline_file)
    assert torn is None
    return {line["step"]: line for line in lines}


def kinds(line: dict[str, Any], worker: int) -> list[str]:
    return [KINDS[kind] for kind in line["workers"][str(worker)][::4]]


def test_a_loss_shows_in_the_record(tmp_path: Path) -> None:
    fault = Fault(step=3, worker=3, at="backward", micro_batch=None)
    result = run_toy(tmp_path, 4, faults=(fault,), steps=9)
    assert result.outcome == "completed"
    steps = timeline(tmp_path / "run")
    assert sorted(steps) == list(range(1, 10))
    assert set(steps[1]["workers"]) == {"0", "1", "2", "3"}
    assert "3" not in steps[3]["workers"], "who was lost tells nothing of its last step"
    plans = {line["generation"]: line for line in read_json_lines(tmp_path / "run" / "plans.jsonl")[0]}
    # the loss is one change of plan, and dividing the work anew, at whichever boundary comes then, another
    last = max(k for k in range(5, 10) if steps[k]["generation"] == steps[k - 1]["generation"])
    plan = plans[steps[last]["generation"]]
    for number, stage in enumerate(plan["stages"]):
        for worker in stage["workers"]:
            seen = kinds(steps[last], worker)
            mine = plan["assignment"][number].count(worker)
            assert seen.count("forward") == mine
            # where the loss is computed it is a span of its own beside the layers' backward
            assert seen.count("backward") == mine * (2 if number == len(plan["stages"]) - 1 else 1)
            assert seen.count("optimizer") == seen.count("reduce") == 1
            assert "recovery" not in seen
    recovered = next(event for event in result.events if isinstance(event, Recovered))
    for worker in (0, 1, 2):
        assert "recovery" in kinds(steps[recovered.from_version + 1], worker)


def test_spans_of_a_worker_do_not_overlap(tmp_path: Path) -> None:
    run_toy(tmp_path, 3, held_out_every=2, held_out_micro_batches=2)
    for line in timeline(tmp_path / "run").values():
        for flat in line["workers"].values():
            ends = [start + duration for start, duration in zip(flat[2::4], flat[3::4], strict=True)]
            assert all(end <= start for end, start in zip(ends[:-1], flat[6::4], strict=True))
    assert "held_out" in kinds(timeline(tmp_path / "run")[3], 0)


def test_every_generation_of_the_steps_is_on_record(tmp_path: Path) -> None:
    fault = Fault(step=2, worker=1, at="forward", micro_batch=None)
    result = run_toy(tmp_path, 4, faults=(fault,))
    lines = read_json_lines(tmp_path / "run" / "plans.jsonl")[0]
    generations = [line["generation"] for line in lines]
    assert generations == sorted(set(generations)), "each once, in order"
    assert {step.generation for step in result.steps} <= set(generations)
    last = result.steps[-1].generation
    after = next(line for line in lines if line["generation"] == last)
    assert "1" in lines[0]["shards"] and "1" not in after["shards"]


def test_the_goodput_on_record_ends_with_the_runs(tmp_path: Path) -> None:
    run = LocalRun(toy_job(tmp_path / "run"), tmp_path / "run", 2)
    run.run()
    books = read_json_lines(tmp_path / "run" / "goodput.jsonl")[0]
    times = [line["time"] for line in books]
    assert times == sorted(times)
    assert books[-1]["goodput"] == run.recorder.ledger.goodput
    assert books[-1]["seconds"].keys() >= {"initialisation", "productive"}
