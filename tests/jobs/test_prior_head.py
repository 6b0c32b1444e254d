"""A captioner that starts from the prior of its training captions: cut, trained, served, one and the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.captions.prior import CaptionPrior
from jobs.data.curated import open_set
from jobs.data.media import decode_pixels
from jobs.data.multimodal import MultimodalData
from jobs.data.multimodal import build as build_data
from jobs.data.tokenizer import CaptionTokenizer
from jobs.models.caption_prior import PriorHead
from jobs.models.captioner import Embedding, build
from jobs.models.gpt import loss
from jobs.serving.decoder import CaptionDecoder, decoder_of
from jobs.serving.engine import Engine
from jobs.serving.generation import Generation, Prompt, Sampling
from jobs.serving.sampling import choose
from jobs.serving.scheduler import Limits
from strategies.job import Fault
from tests.support.captions import SIZE, Row, drawn_row, write_set
from tests.support.chaos import ChaosRun, losses
from tests.support.cluster import toy_job
from tests.support.expected import reference_bits

CONTEXT, STEPS = 60, 6
SAMPLING = Sampling(temperature=1.0, seed=3)


WEIGHTS = pytest.mark.parametrize("category_weight", [0.0, 0.1], ids=["captions", "categories"])
"""The prior of all captions, and the mixture of those of categories that the model learns to see."""


def kinds(number: int, tokenizer: CaptionTokenizer) -> Row:
    return {**drawn_row(number, tokenizer), "category": f"kind {number * 5 % 3}"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_set(tmp_path_factory.mktemp("prior"), row=kinds))


def arguments(source: str, **changes: Any) -> dict[str, Any]:
    sizes = {"image_size": SIZE, "patch": 8, "width": 32, "depth_image": 1, "depth_text": 1, "heads": 2}
    vocabulary = open_set(source).tokenizer.vocabulary
    return {**sizes, "vocabulary": vocabulary, "context": CONTEXT, "prior": source, **changes}


def built(source: str, scale: float = 1.0, **changes: Any) -> list[nn.Module]:
    torch.manual_seed(5)
    layers, _ = build(**arguments(source, **changes))
    with torch.no_grad():
        for parameter in {id(p): p for layer in layers for p in layer.parameters()}.values():
            parameter.mul_(scale if parameter.ndim == 2 else 1.0)
        assert isinstance(layers[-1], PriorHead)
        layers[-1].back_off.weight.normal_(std=0.3)
        layers[-1].back_off.bias.normal_(std=0.3)
        assert isinstance(layers[0], Embedding)
        if layers[0].sight is not None:
            layers[0].sight.weight.normal_(std=0.1)
    return layers


def data_of(source: str, categories: bool = False) -> MultimodalData:
    sizes = {"context": CONTEXT, "slots": 5, "micro_batch_size": 2, "micro_batches": 3}
    return build_data(source=source, seed=1, categories=categories, **sizes)


def forward(layers: Sequence[nn.Module], row: Any) -> Tensor:
    for layer in layers:
        row = layer(row)
    assert isinstance(row, Tensor)
    return row


def test_it_starts_from_the_prior(source: str) -> None:
    """With a network that adds nothing yet, the held-out loss is the report's."""
    layers = [layer.eval() for layer in build(**arguments(source, tied=False))[0]]
    with torch.no_grad():
        layers[-1].weight.zero_()  # type: ignore[operator, union-attr]
    curated, data = open_set(source), data_of(source)

    def said(split: str) -> list[Any]:
        rows = curated.table(split, ["language", "tokens"]).to_pylist()
        return [(row["language"], row["tokens"]) for row in rows]

    tokenizer = curated.tokenizer
    prior = CaptionPrior(said("train"), order=3, vocabulary=tokenizer.vocabulary, end=tokenizer.end)
    with torch.no_grad():
        total, count = loss(forward(layers, data.held_out(0)[0]), data.held_out(0)[1])
    assert int(count) == sum(len(tokens) + 1 for _, tokens in said("held_out"))
    assert float(total) / int(count) == pytest.approx(prior.loss(said("held_out"))[0], rel=1e-5)


def test_prior_of_a_set_that_does_not_fit(source: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no manifest"):
        build(**arguments(source, prior=str(tmp_path)))
    with pytest.raises(ValueError, match="prior_order is 0"):
        build(**arguments(source, prior_order=0))
    with pytest.raises(ValueError, match="vocabulary"):
        build(**arguments(source, vocabulary=20))


@WEIGHTS
def test_packed_samples_do_not_meet(source: str, category_weight: float) -> None:
    layers = [layer.eval() for layer in built(source, 3.0, category_weight=category_weight)]
    data = data_of(source)
    inputs, _ = data.held_out(0)
    together = forward(layers, inputs)[0]
    slots = int(inputs["segment"][0].max()) + 1
    assert slots > 2
    for slot in range(slots):
        here = inputs["segment"][0] == slot
        alone = {name: inputs[name][:1, slot : slot + 1] for name in ("image", "has_image")}
        alone |= {name: inputs[name][:1, here] for name in ("tokens", "position")}
        alone["segment"] = torch.zeros_like(alone["tokens"])
        torch.testing.assert_close(forward(layers, alone)[0], together[here], atol=1e-4, rtol=1e-4)


@WEIGHTS
def test_a_run_with_faults_has_the_bits_of_a_plain_loop(
    source: str, tmp_path: Path, category_weight: float
) -> None:
    categories = category_weight > 0
    job = toy_job(
        tmp_path,
        build_model=partial(build, **arguments(source, category_weight=category_weight)),
        build_data=partial(data_of, source, categories),
        micro_batches=3,
        steps=STEPS,
        faults=(Fault(1, 2, "forward"), Fault(0, 4, "backward")),
    )
    wanted = reference_bits(
        STEPS,
        build_model=job.build_model,
        data=data_of(source, categories),
        micro_batches=3,
        optimizer=job.optimizer,
    )
    result = ChaosRun(job, tmp_path, 4, 2).run()
    assert result.bits == wanted
    assert len(losses(result)) == 2


def answers(layers: list[nn.Module], prompts: Sequence[Prompt], most: int, limit: int) -> list[list[int]]:
    engine = Engine(1, decoder_of(layers, torch.device("cpu")), Limits(sequences=limit))
    for number, prompt in enumerate(prompts):
        engine.submit(number, Generation(prompt, most + number, SAMPLING))
    told = []
    while not engine.is_idle:
        told += engine.step()
    return [[each.token for each in told if each.request == number] for number in range(len(prompts))]


@WEIGHTS
def test_what_is_served_is_what_was_trained(source: str, category_weight: float) -> None:
    """Token by token with a cache, many at once, against the layers on whole rows; and against the prior."""
    changes: dict[str, Any] = {"tied": False, "category_weight": category_weight}
    layers = [layer.eval() for layer in built(source, 6.0, **changes)]
    decoder = decoder_of(built(source, 6.0, **changes), torch.device("cpu"))
    assert isinstance(decoder, CaptionDecoder)
    tokenizer, split = open_set(source).tokenizer, open_set(source).table("held_out").to_pylist()
    images = [decode_pixels(row["image"]) for row in split if row["image"] is not None][:5]
    languages = [tokenizer.language(code) for code in ("en", "de", "en", "fr", "de")]
    prompts = [Prompt((code,), image.tobytes()) for code, image in zip(languages, images, strict=True)]
    found = answers(built(source, 6.0, **changes), prompts, 8, 3)
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        text = list(prompt.tokens)
        for _ in range(8 + number):
            row = {
                "image": torch.from_numpy(image.copy())[None, None],
                "has_image": torch.ones(1, 1, dtype=torch.uint8),
                "tokens": torch.tensor([text]),
                "segment": torch.zeros(1, len(text), dtype=torch.int64),
                "position": torch.arange(len(text))[None],
            }
            with torch.no_grad():
                logits_V = forward(layers, row)[0, -1].numpy()
            text.append(choose(logits_V, SAMPLING, decoder.prefix + len(text)))
        assert found[number] == text[1:]
    assert len({tuple(each[:8]) for each in found}) > 2
    assert found == answers(built(source, 6.0, **changes), prompts, 8, 1), "whoever else is served"
