"""A run's checkpoints as models: the newest, a named one, damaged ones, and newer ones as they come."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from actors.serving import Scale
from jobs.cli import app
from jobs.serve import serve
from jobs.serving.generation import Generation, Prompt
from jobs.serving.host import EngineHost
from jobs.serving.scheduler import Limits
from jobs.serving.source import RunSource, service_of
from runtime.checkpoint import CheckpointDamaged
from tests.support.ray_jobs import wait_until
from tests.support.served import CONTEXT, damage, make_run, write_checkpoint


def same(decoder: object, layers: list[nn.Module]) -> bool:
    """Whether a decoder has exactly these parameters."""
    blocks = decoder.blocks  # type: ignore[attr-defined]
    return all(
        torch.equal(a, b)
        for block, layer in zip(blocks, layers[1:-1], strict=True)
        for a, b in zip(block.parameters(), layer.parameters(), strict=True)
    )


def test_the_newest_whole_checkpoint_is_served_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = make_run(folder)
    layers = [write_checkpoint(folder, recipe, version, version) for version in (10, 20, 30)]
    damage(folder, 30)
    source = RunSource(folder)
    version, decoder = source.first()
    assert version == 20 and same(decoder, layers[1]) and not same(decoder, layers[0])
    assert source.newer_than(20) is None and source.newer_than(10) is not None
    assert same(source.load(10), layers[0])
    with pytest.raises(CheckpointDamaged, match="checksum"):
        source.load(30)
    service = service_of(source, decoder)
    assert (service.name, service.kind, service.context) == ("run", "completions", CONTEXT)


def test_a_named_checkpoint_is_served_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = make_run(folder)
    layers = [write_checkpoint(folder, recipe, version, version) for version in (10, 20)]
    version, decoder = RunSource(folder, 10).first()
    assert version == 10 and same(decoder, layers[0])
    with pytest.raises(ValueError, match=r"step 15 cannot be served: .* checkpoints are: 10, 20"):
        RunSource(folder, 15).first()


def test_a_tied_model_is_filled_in_both_places(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = {"width": 32, "depth": 1, "heads": 2, "context": 16, "vocabulary": 256, "tied": True}
    layers = write_checkpoint(folder, make_run(folder, arguments=arguments), 10, 5)
    _, decoder = RunSource(folder).first()
    weight = layers[0].get_parameter("weight")
    assert torch.equal(decoder.embed(torch.arange(256)), weight)
    x_ND = torch.eye(32)
    assert torch.equal(decoder.logits(x_ND), nn.functional.linear(layers[-1].norm(x_ND), weight))  # type: ignore[operator, union-attr]


def test_a_newer_checkpoint_is_taken_over_and_a_gone_one_recalled(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = make_run(folder)
    write_checkpoint(folder, recipe, 10, 1)
    host = EngineHost(RunSource(folder), Limits(), 1, 0.01)

    def answer(version: int | None = None) -> tuple[list[int], set[int]]:
        async def whole() -> tuple[list[int], set[int]]:
            asked = Generation(Prompt((65, 66)), 12, version=version)
            pieces = [piece async for piece in host.generate(asked, 1)]
            return [t for piece in pieces for t in piece.tokens], {piece.version for piece in pieces}

        return asyncio.run(whole())

    try:
        old = answer()
        assert old[1] == {10}
        write_checkpoint(folder, recipe, 15, 2)
        damage(folder, 15)
        write_checkpoint(folder, recipe, 20, 3)
        wait_until(lambda: host.stats()["version"] == 20, "the newer checkpoint")
        new = answer()
        assert new[1] == {20} and new[0] != old[0]
        assert answer(10) == old  # begun elsewhere before the take-over
        assert answer(15)[1] == answer(7)[1] == {20}  # damaged, and pruned: the newest goes on
        wait_until(lambda: host.stats()["versions"] == 1, "the recalled version to be let go of")
    finally:
        host.close()


def test_whatever_goes_wrong_while_it_is_loaded_a_newer_checkpoint_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_run(tmp_path)
    write_checkpoint(tmp_path, recipe, 10, 1)
    load = RunSource.newer_than
    looks: list[int] = []

    def without_memory(self: RunSource, version: int) -> object:
        if version < 10 or len(looks) >= 3:
            return load(self, version)
        looks.append(version)
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] you tried to allocate 9 bytes")

    monkeypatch.setattr(RunSource, "newer_than", without_memory)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    host = EngineHost(RunSource(tmp_path), Limits(), 1, 0.01)
    try:
        write_checkpoint(tmp_path, recipe, 20, 2)
        wait_until(lambda: host.stats()["version"] == 20, "the newer checkpoint", seconds=20)
    finally:
        host.close()
    told = [record.getMessage() for record in caplog.records if record.name == "jobs.serving.host"]
    assert len(told) == 1 and "alloc_cpu.cpp:117" in told[0], "told once, not at every look"


def test_a_recalled_version_is_loaded_once_for_all_who_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_run(tmp_path)
    write_checkpoint(tmp_path, recipe, 10, 1)
    write_checkpoint(tmp_path, recipe, 20, 2)
    host = EngineHost(RunSource(tmp_path), Limits(), 1, 1000.0)
    load = RunSource.load
    loads: list[int] = []

    def counted(self: RunSource, version: int) -> object:
        loads.append(version)
        time.sleep(0.2)
        return load(self, version)

    monkeypatch.setattr(RunSource, "load", counted)

    async def answers(versions: list[int]) -> list[set[int]]:
        async def one(version: int) -> set[int]:
            asked = Generation(Prompt((65, 66)), 12, version=version)
            return {piece.version async for piece in host.generate(asked, 1)}

        gone = asyncio.create_task(one(10))  # who goes away takes nothing with them
        await asyncio.sleep(0.05)
        gone.cancel()
        return await asyncio.gather(*map(one, versions))

    try:
        assert asyncio.run(answers([10, 7, 10, 10, 7])) == [{10}, {20}, {10}, {10}, {20}]
        assert sorted(loads) == [7, 10]
        assert asyncio.run(answers([10])) == [{10}]
    finally:
        host.close()


def test_an_engine_that_fails_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    write_checkpoint(folder, make_run(folder), 10, 1)
    host = EngineHost(RunSource(folder), Limits(), 1, 1000.0)
    host.check()
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    host._post(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    wait_until(lambda: not host._threads[0].is_alive(), "the engine's thread to end")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        host.check()
    host.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "holds no run"),
        (["RUN", "--checkpoint", "7"], "step 7 cannot be served"),
        (["RUN", "--replicas", "3", "1"], "replicas from 3 to 1 make no sense"),
        (["RUN", "--replicas", "0", "1"], "replicas from 0 to 1 make no sense"),
        (["RUN", "--port", "PORT"], "choose another --host or --port"),
        (["RUN", "--port", "70000"], "choose another --host or --port"),
        (["RUN", "--host", "no.such.host.invalid"], "choose another --host or --port"),
        (["RUN", "--threads", "0"], "threads is 0"),
        (["RUN", "--max-request-mb", "0"], "max-request-mb is 0"),
        (["RUN", "--queue", "-1"], "queue is -1"),
        (["EMPTY"], "has no whole checkpoint yet"),
        (["ODD"], "only bytes \\(256\\) can be turned into text"),
        (["TOY"], "model cannot be served"),
    ],
)
def test_mistakes_end_with_one_sentence_before_anything_is_started(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    write_checkpoint(tmp_path / "RUN", make_run(tmp_path / "RUN"), 10, 1)
    make_run(tmp_path / "EMPTY")
    odd = {"width": 32, "depth": 1, "heads": 2, "context": 16, "vocabulary": 99}
    write_checkpoint(tmp_path / "ODD", make_run(tmp_path / "ODD", arguments=odd), 10, 1)
    toy = make_run(tmp_path / "TOY", model="tests.support.models:build", arguments={})
    write_checkpoint(tmp_path / "TOY", toy, 10, 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        names = {"RUN", "EMPTY", "ODD", "TOY"}
        given = [str(tmp_path / each) if each in names else each.replace("PORT", port) for each in arguments]
        result = CliRunner().invoke(app, ["serve", *given])
    assert result.exit_code == 2, result.output
    sentence = result.output.strip()
    assert sentence.startswith("reknit: ") and "\n" not in sentence
    assert re.search(message, sentence), sentence


def test_scale_bounds_what_is_under_way() -> None:
    assert Scale(1, 3, concurrent=10, queued=5).most_under_way == 35


def test_serve_says_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        serve(tmp_path)
