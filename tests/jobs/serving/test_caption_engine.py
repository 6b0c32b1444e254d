"""The engine on a captioner against the plain model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from jobs.models.captioner import build
from jobs.serving.decoder import CaptionDecoder, decoder_of
from jobs.serving.engine import Engine
from jobs.serving.generation import Generation, Prompt
from jobs.serving.scheduler import Limits

SIZE, RATE = 16, 1600


def layers_of(*, audio: bool) -> list[nn.Module]:
    torch.manual_seed(3)
    layers, _ = build(
        image_size=SIZE,
        patch=4,
        width=32,
        depth_image=1,
        depth_text=2,
        heads=2,
        vocabulary=50,
        context=40,
        audio=audio,
        audio_rate=RATE,
        audio_seconds=0.32,
        mels=8,
    )
    with torch.no_grad():
        for parameter in (p for layer in layers for p in layer.parameters() if p.ndim == 2):
            parameter.mul_(3.0)
    return layers


def media(number: int, *, audio: bool) -> tuple[bytes | None, bytes | None]:
    draw = np.random.default_rng(number)
    image = draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8).tobytes() if number % 4 else None
    clip = draw.integers(-9000, 9000, 300 + 200 * number, dtype=np.int16).tobytes()
    return image, clip if audio and number % 3 else None


def expected(layers: list[nn.Module], prompt: Prompt, most: int, samples: int) -> list[int]:
    """The plain model on a row with one slot, again for every token, as training sees it."""
    clip = np.zeros(samples, dtype=np.int16)
    if prompt.audio is not None:
        given = np.frombuffer(prompt.audio, dtype=np.int16)[:samples]
        clip[: len(given)] = given
    pixels = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    if prompt.image is not None:
        pixels = np.frombuffer(prompt.image, dtype=np.uint8).reshape(SIZE, SIZE, 3).copy()
    tokens = list(prompt.tokens)
    for _ in range(most):
        row = {
            "image": torch.from_numpy(pixels)[None, None],
            "has_image": torch.tensor([[int(prompt.image is not None)]], dtype=torch.uint8),
            "audio": torch.from_numpy(clip)[None, None],
            "has_audio": torch.tensor([[int(prompt.audio is not None)]], dtype=torch.uint8),
            "tokens": torch.tensor([tokens]),
            "segment": torch.zeros(1, len(tokens), dtype=torch.int64),
            "position": torch.arange(len(tokens))[None],
        }
        with torch.no_grad():
            for layer in layers:
                row = layer.eval()(row)
        tokens.append(int(row[0, -1].argmax()))  # type: ignore[index]
    return tokens[len(prompt.tokens) :]


@pytest.mark.parametrize("audio", [False, True])
def test_captions_are_those_of_the_plain_model(audio: bool) -> None:
    prompts = [Prompt((number % 5,), *media(number, audio=audio)) for number in range(7)]
    decoder = decoder_of(layers_of(audio=audio), torch.device("cpu"))
    assert isinstance(decoder, CaptionDecoder)
    engine = Engine(1, decoder, Limits(sequences=3))
    for number, prompt in enumerate(prompts):
        engine.submit(number, Generation(prompt, 10 + 4 * number))
    told = []
    while not engine.is_idle:
        told += engine.step()
    layers = layers_of(audio=audio)
    answers = [[t.token for t in told if t.request == number] for number in range(len(prompts))]
    wanted = [expected(layers, p, 10 + 4 * n, decoder.audio_samples) for n, p in enumerate(prompts)]
    assert answers == wanted
    assert len({tuple(answer[:10]) for answer in wanted}) > 3  # media count


def test_media_that_the_model_does_not_take_are_refused() -> None:
    engine = Engine(1, decoder_of(layers_of(audio=False), torch.device("cpu")))
    with pytest.raises(ValueError, match="768 the model takes"):
        engine.submit(0, Generation(Prompt((1,), b"123"), 3))
    with pytest.raises(ValueError, match="takes no audio"):
        engine.submit(0, Generation(Prompt((1,), None, b"12"), 3))
    with pytest.raises(ValueError, match="context is 41"):
        engine.submit(0, Generation(Prompt((1,)), 40))
