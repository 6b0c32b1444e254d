"""One DeepSpeed engine after another around the same modules: state goes from one to the next bit for bit."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.engines.engine import Engine, grouped_parameters, overlaps, state_of
from actors.engines.links import cut, listening
from actors.engines.module import StepModule
from actors.engines.scalars import Scalars
from jobs.deepspeed_config import engine_settings
from runtime.snapshots import ROWS, Piece, ShardStore
from strategies.engine import EngineSettings
from strategies.model import Model, build_model, flat_parameters
from strategies.options import OptimizerSettings
from tests.support.deepspeed import alone
from tests.support.models import Tokens, build
from tests.support.ray_jobs import toy_recipe

OPTIMIZER = OptimizerSettings(learning_rate=1e-2, warmup_steps=2, decay_steps=20)
MICRO_BATCHES = 2
CPU = torch.device("cpu")

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}}
SGD = {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9}}
WARMUP = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 3, "total_num_steps": 9}}


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    with alone():
        yield


class Life:
    """One process's engines, as a worker makes them."""

    def __init__(self, **config: Any) -> None:
        recipe = toy_recipe("ds", 9, 1, "auto", engine={"name": "deepspeed", "settings": config})
        settings = engine_settings(recipe)
        assert settings is not None
        self.settings: EngineSettings = settings
        self.model: Model = build_model(build, 7)
        self.layout = self.model.layout
        self.module = StepModule(self.model, 7, CPU)
        self.data = Tokens(5)
        self.engine: Engine | None = None
        self._initial = {}
        for block in self.layout.blocks:
            state_3N = torch.zeros(ROWS, block.size)
            state_3N[0] = flat_parameters(self.model, block)
            self._initial[block.index, 0, block.size] = state_3N

    def begin(self, states: dict[Piece, Tensor], version: int, scalars: Scalars | None) -> None:
        """A new engine from pieces of state."""
        if self.engine is not None:
            self.engine.close()
        self.module.reclaim({block: state_3N[0] for (block, _, _), state_3N in states.items()})
        groups = grouped_parameters(self.module, self.settings, OPTIMIZER)
        self.engine = Engine(
            self.module, groups, self.settings, OPTIMIZER, micro_batch_size=2, passes=MICRO_BATCHES
        )
        store = ShardStore()
        for piece, state_3N in states.items():
            store.put(piece, version, state_3N)
        held = self.engine.fragments(self.module.tensors, 0)
        self.overlaps = overlaps(self.layout, states, held)
        for fragment in held:
            self.engine.put(fragment, state_of(self.layout, store, version, fragment))
        self.engine.count(scalars, version)

    def initial(self) -> dict[Piece, Tensor]:
        return {piece: state_3N.clone() for piece, state_3N in self._initial.items()}

    def train(self, steps: Sequence[int]) -> list[tuple[float, float]]:
        """(loss of the last micro-batch, learning rate) of every step."""
        assert self.engine is not None
        found = []
        for step in steps:
            for micro_batch in range(MICRO_BATCHES):
                inputs, targets = self.data.micro_batch(step, micro_batch)
                total, count = self.engine.forward(inputs, targets, step, micro_batch)
                self.engine.backward(total / count)
                rate = self.engine.rate(step)
                self.engine.advance(step)
            found.append((float(total), rate))
        return found

    def state(self) -> dict[Piece, Tensor]:
        assert self.engine is not None
        states = {(b.index, 0, b.size): torch.zeros(ROWS, b.size) for b in self.layout.blocks}
        self.engine.take(self.overlaps, states)
        return states


def same(one: dict[Piece, Tensor], other: dict[Piece, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[piece], other[piece]) for piece in one)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {
            "zero_optimization": {"stage": 1},
            "optimizer": ADAMW,
            "scheduler": WARMUP,
            "bf16": {"enabled": True},
        },
        {"zero_optimization": {"stage": 1, "parameter_alignment": True}, "scheduler": WARMUP},
        {"zero_optimization": {"stage": 2}, "optimizer": SGD, "bf16": {"enabled": True}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        {"zero_optimization": {"stage": 3, "sub_group_size": 500}, "optimizer": ADAMW},
        {
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": True},
            "optimizer": ADAMW,
            "scheduler": WARMUP,
        },
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
    ],
    ids=json.dumps,
)
def test_a_new_engine_goes_on_bit_for_bit(world: None, config: dict[str, Any]) -> None:
    life = Life(**(config or {"gradient_clipping": 1.0}))
    life.begin(life.initial(), 0, None)
    assert same(life.state(), life.initial()), "making an engine changes nothing"
    losses = life.train(range(1, 7))
    expected = life.state()

    life.begin(life.initial(), 0, None)
    first = life.train(range(1, 4))
    assert life.engine is not None
    before, scalars = life.state(), life.engine.counted()
    life.begin(before, 3, scalars)
    assert life.engine.counted() == scalars
    assert same(life.state(), before), "what one engine gave is what the next one has"
    assert first + life.train(range(4, 7)) == losses
    assert same(life.state(), expected)
    assert not same(life.state(), life.initial())
    life.engine.close()


def test_an_interrupted_step_leaves_nothing_behind(world: None) -> None:
    """An engine is taken off its modules between forward and backward."""
    life = Life(zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 0})
    life.begin(life.initial(), 0, None)
    losses = life.train(range(1, 4))
    life.begin(life.initial(), 0, None)
    assert life.engine is not None
    life.engine.forward(*life.data.micro_batch(1, 0), 1, 0)
    life.begin(life.initial(), 0, None)
    assert life.train(range(1, 4)) == losses
    life.engine.close()


START = """
import sys
from actors.engines.group import prepare_deepspeed
prepare_deepspeed()
from deepspeed.runtime.zero.muon import original_muon
print("torch._inductor.compile_fx" in sys.modules)
import torch
torch.compile = lambda function: lambda *arguments: ("compiled", function.__name__, *arguments)
print(*original_muon.zeropower_via_newtonschulz5(1, 2))
"""


def test_what_a_worker_does_not_call_is_not_compiled_at_its_start() -> None:
    pytest.importorskip("deepspeed")
    found = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-2:] == ["False", "compiled zeropower_via_newtonschulz5 1 2"]


def test_only_the_connections_of_known_ports_are_cut() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours, socket.create_server(("127.0.0.1", 0)) as theirs:
        port, other = ours.getsockname()[1], theirs.getsockname()[1]
        assert {port, other} <= listening()
        doomed = socket.create_connection(("127.0.0.1", port))
        spared = socket.create_connection(("127.0.0.1", other))
        accepted, kept = ours.accept()[0], theirs.accept()[0]
        with doomed, spared, accepted, kept:
            woken: list[bytes] = []
            waiting = threading.Thread(target=lambda: woken.append(doomed.recv(1)))
            waiting.start()
            assert cut(frozenset({port}), frozenset()) == 1, "the end that came in on our port"
            waiting.join(30.0)
            assert woken == [b""], "who waits in it is woken"
            kept.sendall(b"x")
            assert spared.recv(1) == b"x"
        with socket.create_connection(("127.0.0.1", port)) as fresh:
            assert fresh.getpeername()[1] == port, "the listener still listens"
