"""Floating-point operations, counted as a layer's operators run: whatever the layer is made of.

A multiply-add counts as two. Matrix products, convolutions and attention count and nothing else does, as is
usual for model FLOPs utilisation (Chowdhery et al., "PaLM", 2022, appendix B); the formulas are PyTorch's own
(``torch.utils.flop_counter``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    shapes = (gradient.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


_aten = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # attention on CPUs, for which PyTorch has kernels but no formulas
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


_OPAQUE = frozenset({_aten.mkldnn_rnn_layer, _aten._cudnn_rnn, _aten.miopen_rnn})
"""Whole networks in one operator, without a formula."""


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs inside its ``with`` block, backward too. ``flops`` is None where something ran of
    which nobody knows what it takes, such as a kernel of another library: nothing is guessed."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: int | None = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would import the whole compiler when the first operator runs: a second in every worker
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.flops is not None:
            try:
                self.flops += _flops_of(func, args, kwargs, out)
            except Exception:  # of private interfaces: a figure for people must not cost the run
                self.flops = None
        return out


def _flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Raises, whatever it is, where that is not known."""
    operator = func._overloadpacket
    formula = _FORMULAS.get(operator)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=out))
    if operator in _OPAQUE or func.namespace not in ("aten", "prim", "prims"):
        raise LookupError(f"no formula for {func}")
    return 0
