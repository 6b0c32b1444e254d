"""Next-byte prediction on text: micro-batches as pure functions of (seed, step, micro-batch).

Shape suffixes: B samples of a micro-batch, T tokens of a sample.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.data.corpus import PYTHON_STDLIB, VOCABULARY, Corpus, open_corpus
from runtime.samples import Read, Samples
from runtime.streams import SampleOrder

# Held-out micro-batches are the same in every run, whatever its seed, so that runs can be compared.
_HELD_OUT_SEED = 0


class TextData:
    """Samples of ``tokens_per_sample`` bytes cut from a corpus; the corpus' tail is held out.

    ``samples`` and ``held_out_samples`` count what is there to train on and to evaluate on, ``epoch_samples``
    how many an epoch uses (what makes no whole step is left out, other samples each epoch); ``digest``
    identifies the corpus' contents. Equal on every worker that reads the same files.
    """

    vocabulary = VOCABULARY

    def __init__(
        self,
        corpus: Corpus,
        *,
        context: int,
        micro_batch_size: int,
        micro_batches: int,
        seed: int,
        held_out_fraction: float,
    ) -> None:
        if context < 1:
            raise ValueError(f"the data's context is {context}: it must be at least 1")
        if not 0.0 <= held_out_fraction < 1.0:
            raise ValueError(
                f"the data's held_out_fraction is {held_out_fraction}: it must be at least 0 and below 1"
            )
        self.digest = corpus.digest
        self.tokens_per_sample = context
        self._tokens = corpus.tokens
        self._held_out_start = _held_out_start(corpus, held_out_fraction)
        self.samples = max(0, (self._held_out_start - 1) // context)
        self.held_out_samples = max(0, (len(corpus.tokens) - self._held_out_start - 1) // context)
        batch = micro_batches * micro_batch_size
        if self.samples < batch:
            raise ValueError(
                f"the text has {self._held_out_start} tokens to train on, making {self.samples} samples of "
                f"{context}, but one step takes {batch}: give more text, a shorter context or a smaller batch"
            )
        if held_out_fraction and self.held_out_samples < micro_batch_size:
            raise ValueError(
                f"the held-out text makes {self.held_out_samples} samples, fewer than one micro-batch "
                f"({micro_batch_size}): raise held_out_fraction, give more text or set it to 0"
            )
        self._order = SampleOrder(seed, self.samples, micro_batch_size, micro_batches)
        self._held_out_order = (
            SampleOrder(_HELD_OUT_SEED, self.held_out_samples, micro_batch_size, 1)
            if held_out_fraction
            else None
        )

    def micro_batch(self, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        """``(inputs_BT, targets_BT)``, int64: micro-batch ``micro_batch`` of ``step`` (from 1)."""
        return self._cut(0, self._order.samples(step, micro_batch))

    @property
    def epoch_samples(self) -> int:
        return self._order.steps_per_epoch * self._order.global_batch

    def inputs(self, step: int, micro_batch: int) -> Read:
        """``inputs_BT`` by itself, with the samples that it was cut from."""
        samples = self._samples(step, micro_batch)
        return Read(self._cut(0, samples[0][1])[0], samples)

    def targets(self, step: int, micro_batch: int) -> Read:
        """``targets_BT`` likewise."""
        samples = self._samples(step, micro_batch)
        return Read(self._cut(0, samples[0][1])[1], samples)

    def _samples(self, step: int, micro_batch: int) -> Samples:
        return ((self._order.epoch(step), self._order.samples(step, micro_batch)),)

    def held_out(self, micro_batch: int) -> tuple[Tensor, Tensor]:
        """``(inputs_BT, targets_BT)``, int64, of text that is never trained on; ``micro_batch`` from 0.

        Raises ValueError if ``held_out_fraction`` is 0.
        """
        if self._held_out_order is None:
            raise ValueError("no text is held out: set the data's held_out_fraction above 0")
        return self._cut(self._held_out_start, self._held_out_order.samples(micro_batch + 1, 0))

    def _cut(self, region: int, samples: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        # Neighbours share a token: the last target of one sample is the first input of the next.
        length = self.tokens_per_sample
        firsts = (region + sample * length for sample in samples)
        cut = np.stack([self._tokens[first : first + length + 1] for first in firsts]).astype(np.int64)
        tokens_BT1 = torch.from_numpy(cut)
        return tokens_BT1[:, :-1].contiguous(), tokens_BT1[:, 1:].contiguous()


def _held_out_start(corpus: Corpus, fraction: float) -> int:
    """The first held-out token: the first document that starts in the last ``fraction`` of the
    corpus, or, where that would leave less than half of it, the exact place."""
    total = len(corpus.tokens)
    if fraction == 0.0:
        return total
    wanted = max(1, round(total * fraction))
    index = int(np.searchsorted(corpus.starts, total - wanted))
    if index < len(corpus.starts) and total - int(corpus.starts[index]) >= wanted / 2:
        return int(corpus.starts[index])
    return total - wanted


def build(
    *,
    context: int,
    micro_batch_size: int,
    micro_batches: int,
    seed: int,
    source: str = PYTHON_STDLIB,
    cache: str | Path | None = None,
    held_out_fraction: float = 0.05,
) -> TextData:
    """Text as bytes from ``source`` (``"python-stdlib"``, a file or a folder), tokenised once.

    ``context`` is in tokens; ``cache`` is the folder of tokenised text, by default the one in
    ``runtime.settings``. Raises ValueError for a source that is missing, empty, damaged or too
    short for one step.
    """
    return TextData(
        open_corpus(source, cache),
        context=context,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        seed=seed,
        held_out_fraction=held_out_fraction,
    )
