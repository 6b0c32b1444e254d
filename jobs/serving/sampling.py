"""How the next token is chosen, as a pure function of (logits, settings, position).

The noise of a position is keyed by (seed, position) and nothing else, so whoever continues a sequence
draws what the first one would have drawn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jobs.serving.generation import Sampling
from runtime.streams import stream_key

_KEY_BITS = 63
"""Of ``stream_key``."""


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of one position of one sequence."""
    return stream_key("sampling", seed, position) / float(1 << _KEY_BITS)


def choose(logits_V: NDArray[np.float32], sampling: Sampling, position: int) -> int:
    """The token at ``position`` (of the whole sequence, from 0). Of equal logits the lowest token wins."""
    if sampling.temperature == 0.0:
        return int(np.argmax(logits_V))
    scaled_V = logits_V.astype(np.float64) / sampling.temperature
    weights_V = np.exp(scaled_V - scaled_V.max())
    order_V = np.argsort(-weights_V, kind="stable")
    cumulative_V = np.cumsum(weights_V[order_V])
    if sampling.top_p < 1.0:
        kept = int(np.searchsorted(cumulative_V, sampling.top_p * cumulative_V[-1])) + 1
        cumulative_V = cumulative_V[:kept]
    threshold = uniform(sampling.seed, position) * cumulative_V[-1]
    place = int(np.searchsorted(cumulative_V, threshold, side="right"))
    return int(order_V[min(place, len(cumulative_V) - 1)])
