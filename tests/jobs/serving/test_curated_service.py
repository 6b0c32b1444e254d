"""A captioner served with the curated set that it was trained on: the same bytes in, by both doors."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile

from jobs.data.curated import open_set
from jobs.data.media import decode_audio, decode_image, decode_pixels, encode_image, encode_samples, fit_image
from jobs.data.tokenizer import CaptionTokenizer
from jobs.serving.app import AppSettings, build
from jobs.serving.decoder import CaptionDecoder
from jobs.serving.host import EngineHost
from jobs.serving.scheduler import Limits
from jobs.serving.source import RunSource, service_of
from tests.support.answering import CAPTIONER, Client, Local
from tests.support.captions import LANGUAGES, RATE, SIZE, Row, drawn_row, write_set
from tests.support.media import picture, tone
from tests.support.served import make_run, write_checkpoint


def png(number: int) -> bytes:
    stream = io.BytesIO()
    picture(number).save(stream, "PNG")
    return stream.getvalue()


def wav(number: int) -> bytes:
    """A clip at another rate than the set's."""
    clip = tone(200.0 + 20 * number, seconds=0.1 + 0.05 * (number % 3), rate=2 * RATE)
    stream = io.BytesIO()
    soundfile.write(stream, clip, 2 * RATE, format="WAV", subtype="FLOAT")
    return stream.getvalue()


def curated_row(number: int, tokenizer: CaptionTokenizer) -> Row:
    """Media as curating stores them, made from the files that clients send below."""
    row = drawn_row(number, tokenizer)
    image = encode_image(fit_image(decode_image(png(number)), SIZE))
    clip = encode_samples(decode_audio(wav(number), rate=RATE))
    return {**row, "image": row["image"] and image, "audio": row["audio"] and clip}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose recipe names a curated set with clips of ``RATE`` Hz."""
    root = tmp_path_factory.mktemp("curated")
    source = write_set(root / "set", row=curated_row)
    vocabulary = open_set(source).tokenizer.vocabulary
    arguments = {**CAPTIONER, "image_size": SIZE, "vocabulary": vocabulary, "audio_rate": RATE}
    recipe = make_run(
        root / "run",
        model="jobs.models.captioner:build",
        arguments=arguments,
        data={
            "build": "jobs.data.multimodal:build",
            "arguments": {
                "source": str(source),
                "context": 60,
                "slots": 2,
                "audio": True,
                "languages": ["de", "en"],
            },
        },
    )
    write_checkpoint(root / "run", recipe, 10, 1)
    return root / "run"


@pytest.fixture(scope="module")
def local(run: Path) -> Iterator[Local]:
    host = EngineHost(RunSource(run), Limits(), 1, 1000.0)
    yield Local(host)
    host.close()


def test_what_is_served_follows_from_run_and_set(run: Path) -> None:
    source = RunSource(run)
    _, decoder = source.first()
    assert isinstance(decoder, CaptionDecoder)
    service = service_of(source, decoder)
    assert (service.kind, service.languages, service.image_size) == ("caption", ("de", "en"), SIZE)
    assert set(LANGUAGES) == set(open_set(str(source.recipe.data.arguments["source"])).tokenizer.languages)
    with pytest.raises(ValueError, match='"fr" is not known: choose from de, en'):
        service.caption_prompt(png(0), "fr", None)
    assert (service.audio_rate, service.prefix) == (RATE, decoder.prefix)
    assert service.room(service.caption_prompt(png(0), None, None)) == 59


@pytest.mark.parametrize("number", [0, 1, 3, 4, 6, 7])  # the others are French
def test_a_request_becomes_the_bytes_that_training_read(run: Path, local: Local, number: int) -> None:
    source = RunSource(run)
    curated = open_set(str(source.recipe.data.arguments["source"]))
    row = curated.read("train", [number], ["language", "image", "audio"]).to_pylist()[0]
    ask = Client(build(service_of(source, source.first()[1]), AppSettings(), local))
    files = {"image": ("picture.png", png(number))}
    if row["audio"] is not None:
        files["audio"] = ("tone.wav", wav(number))
    response = ask("POST", "/v1/caption", files=files, data={"language": row["language"]})
    assert response.status_code == 200, response.text
    prompt = local.asked[-1].prompt
    if row["image"] is not None:
        assert prompt.image == decode_pixels(row["image"]).tobytes()
    assert prompt.audio == row["audio"]
    assert prompt.tokens == (curated.tokenizer.language(row["language"]),)


def test_a_set_that_is_gone_or_another_is_told_of(run: Path, tmp_path: Path) -> None:
    source = RunSource(run)
    _, decoder = source.first()
    text = (run / "recipe.toml").read_text()
    folder = str(source.recipe.data.arguments["source"])
    try:
        (run / "recipe.toml").write_text(text.replace(folder, str(tmp_path / "gone")))
        with pytest.raises(ValueError, match="gone"):
            service_of(source, decoder)
    finally:
        (run / "recipe.toml").write_text(text)
