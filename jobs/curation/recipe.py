"""The recipe of a curated set, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from jobs.recipe.section import Natural, PositiveFloat, Section
from jobs.recipe.table import read_model

Share = Annotated[float, Field(ge=0, lt=1)]
Bits = Annotated[int, Field(ge=0, le=32)]
Text = Annotated[str, Field(min_length=1)]


def _check_quotas(value: Mapping[str, int]) -> Mapping[str, int]:
    for name, quota in value.items():
        if quota < 0:
            raise ValueError(f"{name} must be at least 0")
    return value


Quotas = Annotated[Mapping[str, int], AfterValidator(_check_quotas)]


class Set(Section):
    """What is made, and where: ``folder`` is a path or URI that every worker reaches. ``image_size`` is in
    pixels, ``audio_rate`` in Hz; ``seed`` decides what balance and split pick."""

    name: Text
    folder: Text
    image_size: Annotated[int, Field(ge=8, le=1024)] = 64
    audio_rate: Annotated[int, Field(ge=4_000, le=48_000)] = 16_000
    rows_per_shard: PositiveInt = 2_000
    seed: Natural = 0


class Source(Section):
    """``path`` has a default for Tux Paint only. ``language`` and ``category`` go to what names none.

    ``captions`` (image_folder) is a csv or jsonl file with the columns below; without it, captions are .txt
    files beside the images. The columns are those of ``captions`` and of ``parquet``.
    """

    kind: Literal["tuxpaint", "image_folder", "parquet", "webdataset"]
    path: Text | None = None
    captions: Text | None = None
    language: Text = "en"
    category: Text = "none"
    image_column: Text = "image"
    text_column: Text = "text"
    audio_column: Text = "audio"
    language_column: Text = "language"
    category_column: Text = "category"
    item_column: Text = "item"


class Image(Section):
    """``shortest_side`` in pixels; ``aspect`` is the longer side over the shorter; ``spread`` is the least
    standard deviation of grey levels (0 to 255), ``sharpness`` the least variance of their Laplacian."""

    required: bool = True
    shortest_side: Natural = 32
    aspect: Annotated[float, Field(ge=1)] = 6.0
    spread: Annotated[float, Field(ge=0)] = 2.0
    sharpness: Annotated[float, Field(ge=0)] = 5.0


class Caption(Section):
    """``languages`` that are kept, all of them where none is named; lengths in characters."""

    languages: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    shortest: Natural = 2
    longest: PositiveInt = 300


class Clip(Section):
    """``keep`` false leaves all sound out; ``required`` drops rows without a clip. ``loudness`` is the least
    root mean square in dB of full scale: what is below is silence."""

    keep: bool = True
    required: bool = False
    shortest_seconds: Annotated[float, Field(ge=0)] = 0.2
    longest_seconds: PositiveFloat = 10.0
    loudness: Annotated[float, Field(le=0)] = -50.0


class Duplicates(Section):
    """Images count as the same within ``image_distance`` bits of 64 and ``image_colour`` levels of mean
    colour, clips within ``clip_distance`` bits of 256; ``per_caption`` items may share a caption. Images
    within ``related_distance`` bits, and items that share a caption, never part between the splits."""

    image_distance: Bits = 4
    image_colour: Annotated[float, Field(ge=0, le=255)] = 12.0
    related_distance: Bits = 8
    clip_distance: Bits = 12
    per_caption: PositiveInt = 1


class Balance(Section):
    """The most items of a category and the most rows of a language; 0: any number. ``categories`` and
    ``languages`` say otherwise for single ones."""

    items_per_category: Natural = 0
    rows_per_language: Natural = 0
    categories: Quotas = Field(default={})
    languages: Quotas = Field(default={})


class Split(Section):
    """``held_out`` is a share of the items. Items whose image is alike do not part; nor, with
    ``captions_together``, those with a caption in common, so that none that is held out was seen in training;
    nor, with ``clips_together``, those that are called the same by the same voice. A clip itself is in the
    set once, so it is never on both sides.
    """

    held_out: Share = 0.1
    captions_together: bool = False
    clips_together: bool = True


class Tokens(Section):
    """``vocabulary`` counts all ids of "bpe", special tokens and languages included."""

    kind: Literal["bytes", "bpe"] = "bytes"
    vocabulary: PositiveInt = 2_048


class CurationRecipe(Section):
    """A whole recipe. Raises pydantic's ValidationError; ``load_curation`` puts it in one sentence."""

    set: Set
    source: Source
    image: Image = Image()
    caption: Caption = Caption()
    clip: Clip = Clip()
    duplicates: Duplicates = Duplicates()
    balance: Balance = Balance()
    split: Split = Split()
    tokens: Tokens = Tokens()

    @model_validator(mode="after")
    def _combinations(self) -> CurationRecipe:
        source = self.source
        if source.path is None and source.kind != "tuxpaint":
            raise ValueError(f'source.path is missing: say where the "{source.kind}" lies.')
        if source.captions is not None and source.kind != "image_folder":
            raise ValueError(
                f'source.captions has no meaning for "{source.kind}": remove it, or set source.kind to '
                '"image_folder".'
            )
        if self.caption.shortest > self.caption.longest:
            raise ValueError(
                f"caption.shortest ({self.caption.shortest}) is above caption.longest "
                f"({self.caption.longest}): lower shortest or raise longest."
            )
        if self.clip.shortest_seconds > self.clip.longest_seconds:
            raise ValueError(
                f"clip.shortest_seconds ({self.clip.shortest_seconds}) is above clip.longest_seconds "
                f"({self.clip.longest_seconds}): lower shortest_seconds or raise longest_seconds."
            )
        if self.clip.required and not self.clip.keep:
            raise ValueError("clip.required needs clips: set clip.keep to true, or remove clip.required.")
        if self.duplicates.related_distance < self.duplicates.image_distance:
            raise ValueError(
                f"duplicates.related_distance ({self.duplicates.related_distance}) is below "
                f"duplicates.image_distance ({self.duplicates.image_distance}): raise it, or lower the other."
            )
        return self


def load_curation(path: str | Path, overrides: Sequence[str] = ()) -> CurationRecipe:
    """Reads and checks the recipe at ``path``, with ``overrides`` such as ``set.image_size=32``. Raises
    RecipeError: one sentence."""
    return read_model(Path(path), overrides, CurationRecipe)
