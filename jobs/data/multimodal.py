"""Captions with their images and clips, packed into rows: micro-batches as pure functions of their place.

Shape suffixes: B rows of a micro-batch, K slots of a row (one sample each), T text positions of a row,
N samples of a clip.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from jobs.data.augment import Augmentation, augmented
from jobs.data.curated import CuratedSet, open_set
from jobs.data.media import decode_pixels, decode_samples
from jobs.data.packing import PackedOrder, PackedRow
from jobs.models.gpt import IGNORED
from runtime.samples import Read, Samples, grouped

# Held-out micro-batches are the same in every run, whatever its seed, so that runs can be compared.
_HELD_OUT_SEED = 0


class Captions:
    """What a split says: language and caption of every sample, in memory; and its media, read when needed.

    Samples are the split's rows in ``languages`` (None: all), numbered from 0 in their order; ``images`` and
    ``audio`` say which media are read; ``memory_bytes``: a split that is no larger is kept
    whole, as it is stored.
    """

    def __init__(
        self,
        curated: CuratedSet,
        split: str,
        *,
        languages: Sequence[str] | None,
        images: bool,
        audio: bool,
        memory_bytes: int,
    ) -> None:
        self._set, self._split = curated, split
        self._columns = [name for name, wanted in (("image", images), ("audio", audio)) if wanted]
        table = curated.table(split, ["language", "tokens"])
        self._rows = np.arange(table.num_rows)
        if languages is not None:
            for code in languages:
                curated.tokenizer.language(code)  # raises for one that the set does not know
            chosen = pc.is_in(table["language"], pa.array(languages, pa.string()))
            self._rows = np.flatnonzero(chosen.to_numpy())
            table = table.filter(chosen)
        codes = table["language"].combine_chunks().dictionary_encode()
        numbers = [curated.tokenizer.language(code) for code in codes.dictionary.to_pylist()]
        languages_N = np.asarray(numbers, dtype=np.int64)[codes.indices.to_numpy()]
        tokens = table["tokens"].combine_chunks()
        offsets = tokens.offsets.to_numpy().astype(np.int64)
        captions = tokens.values.to_numpy().astype(np.int64)[offsets[0] : offsets[-1]]
        offsets -= offsets[0]
        # each as its language, its caption and the end: all but the last go in, all but the first come out
        ended = np.insert(captions, offsets[1:], curated.tokenizer.end)
        self._texts = np.insert(ended, offsets[:-1] + np.arange(len(languages_N)), languages_N)
        self._offsets = offsets + 2 * np.arange(len(offsets))
        whole = sum(file.bytes for file in curated.manifest.splits[split]) <= memory_bytes
        # rows are taken from one chunk in an eighth of the time that they are taken from several
        self._media = (
            curated.table(split, self._columns).combine_chunks() if whole and self._columns else None
        )

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Text positions of every sample: its language and its caption (the end is only ever a target)."""
        lengths: npt.NDArray[np.int64] = np.diff(self._offsets) - 1
        return lengths

    def text(self, sample: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(language, caption...) and (caption..., end)."""
        whole = self._texts[self._offsets[sample] : self._offsets[sample + 1]]
        return whole[:-1], whole[1:]

    def of_rows(self, values_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Every sample's, of something that each of the split's rows has."""
        return values_N[self._rows]

    def media(self, samples: Sequence[int]) -> dict[str, list[bytes | None]]:
        """The stored image and clip of each sample."""
        if not self._columns:
            return {}
        rows = self._rows[list(samples)].tolist()
        if self._media is not None:
            table = self._media.take(pa.array(rows, pa.int64()))
        else:
            table = self._set.read(self._split, rows, self._columns)
        return {name: table[name].to_pylist() for name in self._columns}


class MultimodalData:
    """``inputs`` and ``targets`` of a micro-batch each by itself, so that who needs only the latter decodes
    no image. Equal on every worker that reads the same set.

    An epoch uses each of the ``samples`` exactly once (``epoch_samples`` of them); see ``jobs.data.packing``
    for what happens between two.
    """

    def __init__(
        self,
        curated: CuratedSet,
        *,
        context: int,
        slots: int,
        micro_batch_size: int,
        micro_batches: int,
        seed: int,
        languages: Sequence[str] | None,
        images: bool,
        audio_samples: int,
        augmentation: Augmentation,
        memory_bytes: int,
        categories: bool = False,
    ) -> None:
        manifest = curated.manifest
        self.digest = curated.digest
        self.vocabulary = curated.tokenizer.vocabulary
        self.tokens_per_sample = context
        self._context, self._slots, self._seed = context, slots, seed
        self._images, self._audio_samples = images, audio_samples
        self._size = manifest.image_size
        self._augmentation = augmentation

        def captions(split: str) -> Captions:
            return Captions(
                curated,
                split,
                languages=languages,
                images=images,
                audio=audio_samples > 0,
                memory_bytes=memory_bytes,
            )

        self._train, self._held_out = captions("train"), captions("held_out")
        self._categories = self._train.of_rows(curated.kinds()[1]) if categories else None
        self.samples = self.epoch_samples = len(self._train.lengths)
        self.held_out_samples = len(self._held_out.lengths)
        self.order = PackedOrder(
            seed,
            self._train.lengths,
            capacity=context,
            slots=slots,
            rows=micro_batch_size,
            micro_batches=micro_batches,
        )
        self.held_out_order = (
            PackedOrder(
                _HELD_OUT_SEED,
                self._held_out.lengths,
                capacity=context,
                slots=slots,
                rows=micro_batch_size,
                micro_batches=1,
            )
            if self.held_out_samples
            else None
        )

    def inputs(self, step: int, micro_batch: int) -> Read:
        """The first layer's ``jobs.models.captioner.Row`` of a micro-batch of ``step`` (from 1)."""
        rows = self.order.rows(step, micro_batch)
        return Read(self._inputs(self._train, rows, augment=True), _samples(rows))

    def targets(self, step: int, micro_batch: int) -> Read:
        """``targets_BT`` (int64): each position's next token, ``IGNORED`` where there is none."""
        rows = self.order.rows(step, micro_batch)
        return Read(self._targets(self._train, rows), _samples(rows))

    def micro_batch(self, step: int, micro_batch: int) -> tuple[dict[str, Tensor], Tensor]:
        """Both values."""
        rows = self.order.rows(step, micro_batch)
        return self._inputs(self._train, rows, augment=True), self._targets(self._train, rows)

    def held_out(self, micro_batch: int) -> tuple[dict[str, Tensor], Tensor]:
        """As ``micro_batch`` (from 0), of items that are never trained on, their images as they are.

        Raises ValueError if the set holds nothing out.
        """
        if self.held_out_order is None:
            raise ValueError("nothing is held out: curate the set with split.held_out above 0")
        rows = self.held_out_order.rows(micro_batch + 1, 0)
        return self._inputs(self._held_out, rows, augment=False), self._targets(self._held_out, rows)

    def _targets(self, captions: Captions, rows: Sequence[PackedRow]) -> Tensor:
        targets_BT = np.full((len(rows), self._context), IGNORED, dtype=np.int64)
        for b, row in enumerate(rows):
            following = np.concatenate([captions.text(sample)[1] for sample in row.samples])
            targets_BT[b, : len(following)] = following
        return torch.from_numpy(targets_BT)

    def _inputs(self, captions: Captions, rows: Sequence[PackedRow], *, augment: bool) -> dict[str, Tensor]:
        shape, size = (len(rows), self._slots), self._size
        tokens_BT = np.zeros((len(rows), self._context), dtype=np.int64)
        segment_BT = np.full_like(tokens_BT, -1)
        position_BT = np.zeros_like(tokens_BT)
        image = np.zeros((*shape, size, size, 3), dtype=np.uint8)
        has_image_BK = np.zeros(shape, dtype=np.uint8)
        audio_BKN = np.zeros((*shape, self._audio_samples), dtype=np.int16)
        has_audio_BK = np.zeros(shape, dtype=np.uint8)
        # what is held out tells none: it is there for what the model makes of it
        categories = self._categories if captions is self._train else None
        category_BK = np.full(shape, -1, dtype=np.int64)
        media = captions.media([sample for row in rows for sample in row.samples])
        images, clips = iter(media.get("image", ())), iter(media.get("audio", ()))
        for b, row in enumerate(rows):
            begin = 0
            for slot, sample in enumerate(row.samples):
                text = captions.text(sample)[0]
                here = slice(begin, begin + len(text))
                tokens_BT[b, here], segment_BT[b, here] = text, slot
                position_BT[b, here] = np.arange(len(text))
                begin += len(text)
                if categories is not None:
                    category_BK[b, slot] = categories[sample]
                png, pcm = next(images, None), next(clips, None)
                if png is not None:
                    pixels = decode_pixels(png)
                    if augment:
                        pixels = augmented(pixels, self._augmentation, self._seed, row.epoch, sample)
                    image[b, slot], has_image_BK[b, slot] = pixels, 1
                if pcm is not None:
                    clip = decode_samples(pcm)[: self._audio_samples]
                    audio_BKN[b, slot, : len(clip)], has_audio_BK[b, slot] = clip, 1
        arrays = {
            "image": image,
            "has_image": has_image_BK,
            "tokens": tokens_BT,
            "segment": segment_BT,
            "position": position_BT,
        }
        if self._categories is not None:
            arrays["category"] = category_BK
        if self._audio_samples:
            arrays |= {"audio": audio_BKN, "has_audio": has_audio_BK}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _samples(rows: Sequence[PackedRow]) -> Samples:
    return grouped((row.epoch, sample) for row in rows for sample in row.samples)


def build(
    *,
    source: str,
    context: int,
    slots: int,
    micro_batch_size: int,
    micro_batches: int,
    seed: int,
    languages: Sequence[str] | None = None,
    images: bool = True,
    audio: bool = False,
    audio_seconds: float = 4.0,
    crop: float = 0.0,
    jitter: float = 0.0,
    flip: bool = False,
    categories: bool = False,
    memory_mb: int = 256,
) -> MultimodalData:
    """The curated set in the folder ``source`` (a path or the URI of any pyarrow filesystem).

    A row has ``context`` text positions and up to ``slots`` samples; ``micro_batch_size`` counts rows.
    ``languages`` are those whose captions are used (default: all of the set's). ``images`` false leaves all
    images out (what the captions alone can teach), ``audio`` true adds the clips, cut or padded to
    ``audio_seconds``; ``crop``, ``jitter`` and ``flip`` are of ``Augmentation``. ``categories`` true adds the
    kind (``CuratedSet.kinds``) of each training sample, for a model that learns them (``category_weight``).
    Splits of up to ``memory_mb`` MiB are kept in memory as they are stored. Raises ValueError.
    """
    curated = open_set(source)
    rate = curated.manifest.audio_rate or 0
    if audio and not rate:
        raise ValueError(f"the set in {source} has no sound: curate it with audio, or set audio = false")
    return MultimodalData(
        curated,
        context=context,
        slots=slots,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        seed=seed,
        languages=languages,
        images=images,
        audio_samples=round(audio_seconds * rate) if audio else 0,
        augmentation=Augmentation(crop, jitter, flip),
        memory_bytes=memory_mb << 20,
        categories=categories,
    )
