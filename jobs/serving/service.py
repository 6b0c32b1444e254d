"""What a run's model can be asked for, and what turns text, images and sound into its prompts and back."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from jobs.data.media import decode_audio, decode_image, encode_samples, fit_image
from jobs.data.tokenizer import CaptionTokenizer
from jobs.serving.generation import Prompt

MOST_PIXELS = 25_000_000
"""Of an image that is asked about: one of this size takes 0.5 GB while it is decoded. Curation takes larger
ones, but decodes for no strangers."""

MOST_SAMPLES = 48_000 * 60
"""Of a sound that is asked about: a minute at 48 kHz, counted over all channels."""

Kind = Literal["completions", "caption"]


@dataclass(frozen=True)
class Service:
    """``tokenizer`` None: tokens are bytes. ``image_size`` is in pixels; ``audio_rate`` in Hz, None where the
    model takes no sound. ``prefix`` is the number of positions that media take; ``languages`` are those that
    the model was trained on. Picklable.
    """

    name: str
    kind: Kind
    context: int
    prefix: int = 0
    tokenizer: CaptionTokenizer | None = None
    image_size: int = 0
    audio_rate: int | None = None
    languages: tuple[str, ...] = ()

    @property
    def end(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset() if self.tokenizer is None else frozenset({self.tokenizer.end})

    def room(self, prompt: Prompt) -> int:
        """How many tokens an answer can have; 0 or less where the prompt is too long by itself."""
        return self.context - self.prefix - len(prompt.tokens)

    def text_prompt(self, text: str) -> Prompt:
        return Prompt(tuple(text.encode()))

    def caption_prompt(self, image: bytes, language: str | None, audio: bytes | None) -> Prompt:
        """From files' contents, by the same code that made the training set. Raises ValueError."""
        assert self.tokenizer is not None
        if language is None:
            language = "en" if "en" in self.languages else self.languages[0]
        if language not in self.languages:
            raise ValueError(
                f'the language "{language}" is not known: choose from {", ".join(self.languages)}'
            )
        first = self.tokenizer.language(language)
        clip = None
        if audio is not None:
            if self.audio_rate is None:
                raise ValueError("the model takes no audio: it was trained without")
            clip = encode_samples(decode_audio(audio, rate=self.audio_rate, most_samples=MOST_SAMPLES))
        pixels = fit_image(decode_image(image, most_pixels=MOST_PIXELS), self.image_size)
        return Prompt((first,), pixels.tobytes(), clip)

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """A piece of text for every token, as they come; "" while a character is not complete."""
        if self.tokenizer is not None:
            return self.tokenizer.decode_stream(tokens)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return (decoder.decode(bytes([token])) for token in tokens)
