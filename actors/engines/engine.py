"""One rank's DeepSpeed engine in one generation: made from full parameters, fed with pieces of state.

A new group gets a new engine around the same modules in the same process; that takes milliseconds, since
everything slow (imports, compiled kernels) has been paid for in the worker's warm-up.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actors.engines import scalars
from actors.engines.fragments import Fragment, fragments, inner_optimizer, make_moments
from actors.engines.module import StepModule
from actors.engines.scalars import Scalars
from runtime.layout import Layout
from runtime.settings import be_local_rank
from runtime.snapshots import ROWS, Piece, ShardStore
from strategies.engine import EngineSettings, parameter_groups
from strategies.options import OptimizerSettings


@dataclass(frozen=True, slots=True)
class Overlap:
    """``place`` of a piece's state (3, n) is ``part`` of a flat tensor and of the moments beside it."""

    piece: Piece
    place: slice
    flat: Tensor
    part: slice


class Engine:
    """Wraps ``deepspeed.initialize``. All ranks must make the same calls in the same order.

    ``passes`` is the number of micro-batches of every rank in a step. The process group must be there.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Iterable[dict[str, Any]],
        settings: EngineSettings,
        optimizer: OptimizerSettings,
        *,
        micro_batch_size: int,
        passes: int,
    ) -> None:
        import deepspeed

        be_local_rank(0)
        _number_from_zero()
        self._settings = settings
        self._optimizer = optimizer
        config = {
            "steps_per_print": 1 << 60,
            **json.loads(settings.config),
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": passes,
        }
        own: Any = {}
        listed = list(groups)
        if settings.own_optimizer:
            own["model_parameters"] = [parameter for group in listed for parameter in group["params"]]
        else:
            own["optimizer"] = torch.optim.AdamW(
                listed, lr=optimizer.rate(1), betas=optimizer.betas, eps=optimizer.eps, foreach=False
            )
        self.engine: Any = deepspeed.initialize(model=module, config=config, dist_init_required=False, **own)[
            0
        ]
        inner = inner_optimizer(self.engine)
        self._groups = [
            {name: copy.copy(entry) for name, entry in group.items() if name != "params"}
            for group in inner.param_groups
        ]
        self.moments = make_moments(self.engine, settings.stage)

    # --- state ------------------------------------------------------------------------------

    def count(self, known: Scalars | None, version: int) -> None:
        """Step counters, rates, scheduler and loss scale after ``version`` steps."""
        if known is None:
            scalars.count_from(self.engine, self._settings.stage, self._groups, version)
        else:
            scalars.write(self.engine, self._settings.stage, known)

    def counted(self) -> Scalars:
        return scalars.read(self.engine, self._settings.stage)

    def fragments(self, tensors: dict[int, nn.Parameter], rank: int) -> list[Fragment]:
        return list(fragments(self.engine, self._settings.stage, tensors, rank))

    def rows(self, flat: Tensor, part: slice) -> list[Tensor]:
        """Views of the parameters and each of the moments in one part of a flat tensor."""
        state = inner_optimizer(self.engine).state[flat]
        return [flat.detach().view(-1)[part], *(state[name].view(-1)[part] for name in self.moments)]

    def take(self, overlaps: Iterable[Overlap], states: dict[Piece, Tensor]) -> None:
        """Copies this rank's state into ``states``, (3, n) each; rows that the optimizer lacks stay as they
        are."""
        for overlap in overlaps:
            for row, view in enumerate(self.rows(overlap.flat, overlap.part)):
                states[overlap.piece][row, overlap.place].copy_(view)

    def put(self, fragment: Fragment, state_3N: Tensor) -> None:
        """Gives a fragment its parameters and moments."""
        for row, view in enumerate(self.rows(fragment.flat, fragment.place)):
            view.copy_(state_3N[row])

    # --- a step -----------------------------------------------------------------------------

    def forward(self, inputs: Any, targets: Any, step: int, micro_batch: int) -> tuple[Tensor, Any]:
        outcome: tuple[Tensor, Any] = self.engine(inputs, targets, step, micro_batch)
        return outcome

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def advance(self, step: int) -> None:
        """After each backward: the last one of a step updates the parameters."""
        if not self._settings.own_rate:
            for group in self.engine.optimizer.param_groups:
                group["lr"] = self._optimizer.rate(step)
        self.engine.step()

    def rate(self, step: int) -> float:
        """The learning rate of the step under way."""
        return float(self.engine.get_lr()[0]) if self._settings.own_rate else self._optimizer.rate(step)

    @property
    def gradient_norm(self) -> float:
        """Of the step just made, before clipping; 0.0 where DeepSpeed does not say."""
        norm = self.engine.get_global_grad_norm()
        return 0.0 if norm is None else float(norm)

    def train(self, training: bool) -> None:
        self.engine.train(training)

    def close(self) -> None:
        """Takes the engine off its module, in whatever state an interrupted step has left it."""
        from deepspeed.runtime.zero import parameter_offload

        with suppress(Exception):  # half a step may leave it inconsistent; the module is reclaimed anyway
            self.engine.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()  # an interrupted forward does not unwind it


def _number_from_zero() -> None:
    """ZeRO-3 numbers parameters and modules through a process's life and compares the numbers of all ranks,
    but newcomers have made fewer engines than the others. It counts modules in a default argument."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    Init.param_id = 0
    (count,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    count[0] = 0


def grouped_parameters(
    module: StepModule, settings: EngineSettings, optimizer: OptimizerSettings
) -> list[dict[str, Any]]:
    """The optimizer's parameter groups in the order of ``strategies.engine.parameter_groups``."""
    layout = module.layout
    return [
        {
            "params": [module.tensors[index] for index in group],
            "weight_decay": optimizer.weight_decay if layout.tensors[group[0]].decays else 0.0,
        }
        for group in parameter_groups(layout, settings.own_optimizer)
    ]


def overlaps(layout: Layout, owned: Iterable[Piece], held: Iterable[Fragment]) -> list[Overlap]:
    """Where the pieces that a worker owns lie in its engine.

    AssertionError if the engine does not hold an element of them: the plan's shards must be cut by
    DeepSpeed's own rule.
    """
    pieces = list(owned)
    block_of = {tensor.index: block for block in layout.blocks for tensor in block.tensors}
    found, elements = [], 0
    for fragment in held:
        block, offset = block_of[fragment.index].index, layout.tensors[fragment.index].offset
        for piece in pieces:
            low = max(offset + fragment.start, piece[1])
            high = min(offset + fragment.stop, piece[2])
            if piece[0] == block and low < high:
                at = fragment.at + low - offset - fragment.start
                found.append(
                    Overlap(
                        piece,
                        slice(low - piece[1], high - piece[1]),
                        fragment.flat,
                        slice(at, at + high - low),
                    )
                )
                elements += high - low
    wanted = sum(
        max(0, min(piece[2], tensor.stop) - max(piece[1], tensor.offset))
        for piece in pieces
        for tensor in layout.blocks[piece[0]].tensors
    )
    assert elements == wanted, f"the engine holds {elements} of {wanted} elements that the plan says it owns"
    return found


def state_of(layout: Layout, store: ShardStore, version: int, fragment: Fragment) -> Tensor:
    """The state (3, n) of a fragment, from what the store keeps of ``version``."""
    tensor = layout.tensors[fragment.index]
    block = next(block.index for block in layout.blocks if tensor in block.tensors)
    state_3N = store.read((block, tensor.offset + fragment.start, tensor.offset + fragment.stop), version)
    assert state_3N is not None and state_3N.shape[0] == ROWS, f"nothing is held of {tensor.name}"
    return state_3N
