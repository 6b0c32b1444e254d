"""A worker's warm-up: every layer runs once, is timed, and is checked for what cannot be exact."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from runtime.contention import seconds_without_core
from runtime.streams import seed_layer
from strategies.anatomy import Anatomy, anatomy
from strategies.boundary import Spec, Value, flatten, unflatten
from strategies.differentiation import differentiate_ones, leaf, owes_gradient
from strategies.flops import FlopCounter
from strategies.model import Model
from strategies.options import Precision
from strategies.profile import Profile
from strategies.sequence.sharing import Sharing
from strategies.sequence.timing import sharing_of

RUNS = 4
"""Each layer is timed so often and its fastest run counts: the first pays for lazy initialisation."""

Form = tuple[Spec, list[tuple[torch.Size, torch.dtype]]]
"""How a value is made up, and the shapes and types of its tensors."""

LONG = 0.02
"""Seconds; for a layer that takes longer the second run is the last: a newcomer's warm-up is time that the
others train without it."""


def profile(
    model: Model,
    inputs: Value,
    targets: Value,
    *,
    seed: int,
    precision: Precision,
    device: torch.device,
    detailed: bool = False,
    shared: bool = False,
    joints: Sequence[int] = (),
) -> Profile:
    """Runs one micro-batch through the layers, one at a time, and through the loss. ``detailed``: with all
    that a search wants to know, by two more runs; ``shared``: and how teams divide the layers, by as many.
    ``joints``: layers whose
    inputs must be of one form, since what comes between is skipped or done in another order (``paths``).

    Raises ValueError for a layer that changes its buffers in forward, for a loss that does not
    return (scalar, count), and for inputs at ``joints`` that are not alike.
    """
    joined: tuple[int, Form] | None = None
    forward: list[float] = []
    backward: list[float] = []
    boundary_bytes: list[int] = []
    flops: list[int | None] = []
    details: list[Anatomy] = []
    sharings: list[Sharing | None] = []
    value = inputs
    for index, layer in enumerate(model.layers):
        layer.to(device)
        layer.train()
        tensors, spec = flatten(value)
        tensors = [tensor.to(device).detach() for tensor in tensors]
        if index in joints:
            joined = _joined(joined, index, (spec, [(tensor.shape, tensor.dtype) for tensor in tensors]))
        once = partial(_run_once, index, layer, tensors, spec, seed, precision, device)
        run, counted = _counted(once)  # the first run is the slow one anyway
        seconds_forward, seconds_backward = run.forward, run.backward
        for _ in range(RUNS - 1):
            run = once()
            seconds_forward = min(seconds_forward, run.forward)
            seconds_backward = min(seconds_backward, run.backward)
            if seconds_forward + seconds_backward > LONG:
                break
        forward.append(seconds_forward)
        backward.append(seconds_backward + (seconds_forward if index in precision.recompute else 0.0))
        boundary_bytes.append(sum(tensor.nbytes for tensor in run.outputs))
        flops.append(counted)
        if detailed:
            details.append(_detail(index, layer, tensors, spec, seed, precision, device))
        if shared:
            sharings.append(_sharing(layer, tensors, precision, device))
        value = unflatten(run.outputs, run.spec)
    _check_loss(model, value, targets, device)
    known = tuple(each for each in flops if each is not None)
    whole = known if len(known) == len(flops) else None
    known_sharings = [each for each in sharings if each is not None]
    return Profile(
        tuple(forward),
        tuple(backward),
        tuple(boundary_bytes),
        whole,
        tuple(each.kept_bytes for each in details),
        tuple((each.input_gradient, each.weight_gradient) for each in details),
        sum(tensor.nbytes for tensor in flatten(inputs)[0]),
        tuple(known_sharings) if len(known_sharings) == len(sharings) else (),
    )


class _Clock:
    """Seconds since it was made or last asked, without those in which this thread had no core: workers that
    warm up together on one machine delay each other, which must not tilt the first cut."""

    def __init__(self) -> None:
        self._at, self._without = time.perf_counter(), seconds_without_core()

    def lap(self) -> float:
        at, without = time.perf_counter(), seconds_without_core()
        passed = at - self._at - (without - self._without)
        self._at, self._without = at, without
        return max(passed, 0.0)


def _joined(before: tuple[int, Form] | None, index: int, form: Form) -> tuple[int, Form]:
    if before is None or before[1] == form:
        return before or (index, form)
    raise ValueError(
        f"layers {before[0]} and {index} take inputs of different forms ({_in_words(before[1])}; "
        f"{_in_words(form)}), but where stages are skipped micro-batches may come to either from one layer: "
        "let all layers between the first and the last hand on what they take, or remove [paths]"
    )


def _in_words(form: Form) -> str:
    return ", ".join(f"{dtype} {tuple(shape)}" for shape, dtype in form[1])


@dataclass(frozen=True, slots=True)
class _Run:
    """Seconds, and the layer's detached outputs."""

    forward: float
    backward: float
    outputs: list[Tensor]
    spec: Spec


def _run_once(
    index: int,
    layer: nn.Module,
    tensors: Sequence[Tensor],
    spec: Spec,
    seed: int,
    precision: Precision,
    device: torch.device,
) -> _Run:
    leaves = [leaf(tensor.clone(), owes_gradient(index)) for tensor in tensors]
    buffers = [(name, buffer, buffer._version) for name, buffer in layer.named_buffers()]
    clock = _Clock()
    seed_layer(seed, 0, 0, index, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision.autocast):
        outputs, output_spec = flatten(_run(index, layer, unflatten(leaves, spec)))
    _synchronise(device)
    forward = clock.lap()
    if any(each._version for each in leaves):  # torch itself sees to those that want gradients
        raise _changes_its_input(index, layer)
    _refuse_changed_buffers(index, layer, buffers)
    clock.lap()
    differentiate_ones(outputs, [*leaves, *layer.parameters()])
    _synchronise(device)
    return _Run(forward, clock.lap(), [tensor.detach() for tensor in outputs], output_spec)


def _detail(
    index: int,
    layer: nn.Module,
    tensors: Sequence[Tensor],
    spec: Spec,
    seed: int,
    precision: Precision,
    device: torch.device,
) -> Anatomy:
    leaves = [leaf(tensor.clone(), owes_gradient(index)) for tensor in tensors]

    def run() -> Sequence[Tensor]:
        seed_layer(seed, 0, 0, index, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision.autocast):
            return flatten(_run(index, layer, unflatten(leaves, spec)))[0]

    clock = _Clock()

    def lap() -> float:
        _synchronise(device)
        return clock.lap()

    return anatomy(layer, leaves, run, lap)


def _sharing(
    layer: nn.Module, tensors: Sequence[Tensor], precision: Precision, device: torch.device
) -> Sharing | None:
    clock = _Clock()

    def lap() -> float:
        _synchronise(device)
        return clock.lap()

    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision.autocast):
        return sharing_of(layer, tensors, lap)


def _counted(once: Callable[[], _Run]) -> tuple[_Run, int | None]:
    """A run, and the operations in it; None where they cannot be counted."""
    counter = FlopCounter()
    try:
        with counter:
            return once(), counter.flops
    except (
        Exception
    ):  # the layer's own, which is met again, or that of the counting, which costs the count only
        return once(), None


def _run(index: int, layer: nn.Module, value: Value) -> Value:
    try:
        return layer(value)
    except RuntimeError as error:
        if "in-place" not in str(error):
            raise
        raise _changes_its_input(index, layer) from error


def _changes_its_input(index: int, layer: nn.Module) -> ValueError:
    return ValueError(
        f"layer {index} ({type(layer).__name__}) changes its input in place, but whoever gave it, on this "
        "worker or another, may need it again: use the operation that returns a new tensor (inplace=False)"
    )


def _refuse_changed_buffers(index: int, layer: nn.Module, before: Sequence[tuple[str, Tensor, int]]) -> None:
    after = dict(layer.named_buffers())
    for name, buffer, version in before:
        if after.get(name) is not buffer or buffer._version != version:
            raise ValueError(
                f"layer {index} ({type(layer).__name__}) changes its buffer {name} in forward, so its result "
                "would depend on which worker computed which micro-batch; make the layer stateless"
            )


def _check_loss(model: Model, output: Value, targets: Value, device: torch.device) -> None:
    tensors, spec = flatten(targets)
    result = model.loss(output, unflatten([tensor.to(device) for tensor in tensors], spec))
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor)):
        raise ValueError("the loss must return (sum of the losses, number of samples or tokens)")
    if result[0].ndim != 0 or result[0].dtype != torch.float32:
        raise ValueError(
            f"the loss must return its sum as a float32 scalar, not {result[0].dtype} of shape "
            f"{tuple(result[0].shape)}"
        )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
