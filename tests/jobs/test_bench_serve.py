"""The serving bench: a peer that answers as the engine does, and figures from turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.bench.plain_serve import PaddedGenerator
from jobs.bench.serve import ANSWER, PROMPT, Reply, Turn, equal_share, prepare, report, workload
from jobs.serving.engine import Engine
from jobs.serving.generation import Generation, Prompt
from jobs.serving.source import RunSource


def test_the_peer_gives_the_engines_answers(tmp_path: Path) -> None:
    """On the bench's own model: padding and a batch's neighbours change nothing that is told."""
    _, decoder = RunSource(prepare(tmp_path / "run")).first()
    requests = [(list(each.prompt.encode())[:40], min(each.max_tokens, 20)) for each in workload(6, 3)]
    engine = Engine(1, decoder)
    for number, (prompt, most) in enumerate(requests):
        engine.submit(number, Generation(Prompt(tuple(prompt)), most))
    told = []
    while not engine.is_idle:
        told += engine.step()
    answers = [[t.token for t in told if t.request == number] for number in range(len(requests))]
    assert PaddedGenerator(decoder)(requests) == answers
    assert {len(answer) for answer in answers} != {20}


def test_the_workload_is_mixed_and_always_the_same() -> None:
    requests = workload(400, 5)
    assert requests == workload(400, 5) != workload(400, 6)
    for lengths, (low, high) in (
        ([len(each.prompt) for each in requests], PROMPT),
        ([each.max_tokens for each in requests], ANSWER),
    ):
        assert low <= min(lengths) < 2 * low and high / 2 < max(lengths) <= high


def turn(texts: list[str | None], seconds: float) -> Turn:
    return Turn(tuple(Reply(text, seconds / len(texts)) for text in texts), seconds)


def test_figures() -> None:
    ours = [turn(["a", "b"], 1.0), turn(["a", "b"], 2.0), turn(["a", "b"], 1.0)]
    plain = [turn(["a", "b"], 2.0), turn(["a", "b"], 3.0), turn(["a", "b"], 9.0)]
    whole = turn(["a", "b", "c", "d"], 4.0)
    good = report(ours, plain, whole, whole)
    assert good.headline == {"ratio_to_plain_serve": 2.0, "equal_answers": 1.0, "failed_requests": 0}
    assert good.met
    assert good.rows[0]["requests_per_second"] == 2.0 and good.rows[0]["p50_seconds"] == 0.5


@pytest.mark.parametrize("texts", [["a", "b", "c", None], ["a", "b", "c", "x"]])
def test_lost_and_changed_answers_count_as_failed(texts: list[str | None]) -> None:
    ours, plain = [turn(["a", "b"], 1.0)], [turn(["a", "b"], 9.0)]
    found = report(ours, plain, turn(texts, 4.0), turn(["a", "b", "c", "d"], 4.0))
    assert found.headline["failed_requests"] == 1 and not found.met


def test_failed_replies_are_equal_to_nothing() -> None:
    assert equal_share(turn([None, "a"], 1.0), turn([None, "a"], 1.0)) == 0.5
