"""The prior as a mixture over categories that a picture and the words so far make more or less likely."""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.captions.prior import CaptionPrior
from jobs.data.multimodal import MultimodalData
from jobs.data.multimodal import build as build_data
from jobs.data.tokenizer import CaptionTokenizer
from jobs.models import gpt
from jobs.models.caption_prior import PriorTable
from jobs.models.captioner import build
from jobs.models.category_prior import PULL, SMOOTHING, CategoryHead, CategoryTable, category_loss
from jobs.models.descriptor import Descriptor
from tests.support.captions import SIZE, Row, coloured_row, write_set

VOCABULARY, END, ORDER, WIDTH = 12, 0, 2, 8
ENGLISH, GERMAN = 10, 11
TEXTS = [
    (0, (ENGLISH, 1, 2, 3)),
    (0, (ENGLISH, 1, 2, 2, 2, 2)),
    (1, (ENGLISH, 1, 4, 1, 4, 1, 4)),
    (1, (ENGLISH, 4, 4)),
    (1, (GERMAN, 5, 6, 5, 6)),
    (2, (GERMAN, 5, 2)),
    (2, (ENGLISH, 1, 2)),
    (2, (GERMAN, 7)),
]


def head_of(texts: list[tuple[int, tuple[int, ...]]]) -> CategoryHead:
    about: Any = {"order": ORDER, "vocabulary": VOCABULARY, "end": END}
    table = PriorTable([text for _, text in texts], **about)
    apart = CategoryTable(texts, categories=3, **about)
    head = CategoryHead(VOCABULARY, WIDTH, None, table, apart, media_tokens=1)
    with torch.no_grad():
        head.weight.zero_()
        head.back_off.bias.fill_(log(SMOOTHING))
    return head


def row_of(texts: list[tuple[int, tuple[int, ...]]], seen: Tensor, *, padding: int = 0) -> dict[str, Any]:
    """What comes into the head: a row of ``texts``, each with one media position."""
    tokens = [token for _, text in texts for token in text] + [0] * padding
    segment = [slot for slot, (_, text) in enumerate(texts) for _ in text] + [-1] * padding
    position = [place + 1 for _, text in texts for place in range(len(text))] + [1] * padding
    count = len(texts)
    return {
        "x": torch.randn(1, count + len(tokens), WIDTH, generator=torch.Generator().manual_seed(1)),
        "segment": torch.tensor([[*range(count), *segment]]),
        "position": torch.tensor([[0] * count + position]),
        "media": count,
        "tokens": torch.tensor([tokens]),
        "seen": seen[None],
        "category": torch.tensor([[category for category, _ in texts]]),
    }


def test_told_the_category_it_is_the_reports_prior() -> None:
    head = head_of(TEXTS).eval()
    captions = [("en" if text[0] == ENGLISH else "de", text[1:]) for _, text in TEXTS]
    general = CaptionPrior(captions, order=ORDER, vocabulary=VOCABULARY, end=END)
    for category, text in TEXTS:
        language = "en" if text[0] == ENGLISH else "de"
        special = CaptionPrior(
            [caption for (other, _), caption in zip(TEXTS, captions, strict=True) if other == category],
            order=ORDER,
            vocabulary=VOCABULARY,
            end=END,
        )
        sure = torch.full((1, 3), -1e4).index_fill(1, torch.tensor([category]), 0.0)
        with torch.no_grad():
            logits_TV = head(row_of([(category, text)], sure))[0]
        for place, (context, token) in enumerate(general.places(text[1:])):
            beyond = general.probability(language, context, token, SMOOTHING)
            wanted = special.probability(language, context, token, PULL, beyond)
            assert float(logits_TV[place, token].exp()) == pytest.approx(wanted, rel=1e-4)


def test_a_distribution_at_every_place_and_words_tell_the_category() -> None:
    head, unknown = head_of(TEXTS).eval(), torch.zeros(1, 3)

    def told(text: tuple[int, ...], seen: Tensor) -> Tensor:
        with torch.no_grad():
            logits_TV = head(row_of([(0, text)], seen, padding=2))[0, : len(text)]
        torch.testing.assert_close(logits_TV.exp().sum(-1), torch.ones(len(text)))
        return logits_TV[-1]

    few, many = (ENGLISH, 1, 2), (ENGLISH, *[4] * 9, 1, 2)  # only one category has a 4 in English
    sure_V = told(few, torch.tensor([[-1e4, 0.0, -1e4]]))
    assert (told(many, unknown) - sure_V).abs().max() < 0.2 * (told(few, unknown) - sure_V).abs().max()


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_training_leaves_a_caption_out_of_its_own_prior(number: int) -> None:
    """In a row with others it has the prior that tables without it give."""
    others = [each for place, each in enumerate(TEXTS) if place != number]
    seen = torch.randn(3, 3, generator=torch.Generator().manual_seed(number))
    row = [others[0], TEXTS[number], others[-1]]
    begin = len(row[0][1])
    stop = begin + len(TEXTS[number][1])
    head, without = head_of(TEXTS).train(), head_of(others).eval()
    # what is common is another thing than what is counted
    shares = head.apart.log_shares() - without.apart.log_shares()
    with torch.no_grad():
        found_TV = head(row_of(row, seen, padding=2))["logits"][0, begin:stop]
        wanted_TV = without(row_of([TEXTS[number]], seen[1:2] + shares))[0]
        counted_TV = head_of(TEXTS).eval()(row_of([TEXTS[number]], seen[1:2]))[0]
    # a network adds nothing and x differs, so that only the prior is compared
    torch.testing.assert_close(found_TV, wanted_TV, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(found_TV, counted_TV, atol=1e-2)


def test_nobody_is_told_the_category_but_in_training() -> None:
    head, row = head_of(TEXTS).eval(), row_of(TEXTS[:3], torch.randn(3, 3))
    with torch.no_grad():
        logits_BTV = head(row)
        assert torch.equal(head({**row, "category": (row["category"] + 1) % 3}), logits_BTV)
        assert torch.equal(head({name: row[name] for name in row if name != "category"}), logits_BTV)
    with pytest.raises(ValueError, match="set the data's categories"):
        head.train()({name: row[name] for name in row if name != "category"})


def test_the_loss_has_the_categories_in_training_only() -> None:
    logits, targets = torch.randn(1, 4, VOCABULARY), torch.tensor([[1, 2, gpt.IGNORED, 3]])
    guess = torch.randn(1, 3, 3).log_softmax(-1)
    output = {"logits": logits, "guess": guess, "category": torch.tensor([[2, 0, -1]])}
    total, count = gpt.loss(logits, targets)
    assert category_loss(logits, targets, 0.5) == (total, count)
    found, tokens = category_loss(output, targets, 0.5)
    assert tokens == count
    torch.testing.assert_close(found, total - 0.5 * (guess[0, 0, 2] + guess[0, 1, 0]))


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    sizes: Any = {"image_size": 16, "patch": 8, "width": 16, "depth_image": 1, "depth_text": 1, "heads": 2}
    for changes in ({"category_weight": 0.1}, {"category_weight": -0.1, "prior": str(tmp_path)}):
        with pytest.raises(ValueError, match="category_weight"):
            build(**sizes, vocabulary=30, context=20, **changes)


def test_pictures_that_differ_are_described_differently() -> None:
    pixels = torch.zeros(4, 3, 16, 16)
    pixels[1, :, :, 4:12] = 1.0  # upright
    pixels[2, :, 4:12] = 1.0  # lying
    pixels[3, 0, :, 4:12] = 1.0  # upright, and coloured
    found = Descriptor()(pixels)
    assert found.shape == (4, Descriptor.size) and bool(found.isfinite().all())
    distances = torch.cdist(found, found) + torch.eye(4) * 9
    assert distances.min() > 0.3
    torch.testing.assert_close(Descriptor()(pixels[2:3])[0], found[2])


COLOURS = {"leaf": (40, 200, 60), "rose": (220, 40, 60), "sea": (40, 60, 220)}


def told_by_colour(number: int, tokenizer: CaptionTokenizer) -> Row:
    """One of three colours with some noise, which is its category; two names for each, in no order."""
    category = sorted(COLOURS)[number * 7 % 3]
    caption = f"{category} {'of old' if number * 5 % 4 < 2 else 'anew'}"
    about = {"category": category, "language": "en", "caption": caption}
    return coloured_row(number, tokenizer, **about, colour=COLOURS[category], noise=30)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("colours")
    return str(write_set(folder, {"train": (60,), "held_out": (24,)}, told_by_colour))


def data_of(source: str, images: bool) -> MultimodalData:
    sizes = {"context": 60, "slots": 6, "micro_batch_size": 2, "micro_batches": 1}
    return build_data(source=source, seed=1, images=images, categories=True, **sizes)


def held_out(source: str, images: bool) -> tuple[float, Tensor]:
    """(nats per token, what a new rose is taken for) of a model that was trained for a few steps."""
    data = data_of(source, images)
    sizes: Any = {"image_size": SIZE, "patch": 8, "width": 16, "depth_image": 1, "depth_text": 1, "heads": 2}
    torch.manual_seed(3)
    layers, criterion = build(
        **sizes, vocabulary=data.vocabulary, context=60, dropout=0.0, prior=source, category_weight=0.3
    )
    parameters = {id(each): each for layer in layers for each in layer.parameters()}.values()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def output(row: Any) -> Any:
        for layer in layers:
            row = layer(row)
        return row

    for step in range(1, 31):
        row, targets = data.micro_batch(step, 0)
        total, count = criterion(output(row), targets)
        optimizer.zero_grad()
        torch.autograd.backward(total / count)
        optimizer.step()
    for layer in layers:
        layer.eval()
    with torch.no_grad():
        results = [criterion(output(row), targets) for row, targets in map(data.held_out, range(2))]
        rose = torch.tensor(COLOURS["rose"], dtype=torch.uint8).expand(1, 1, SIZE, SIZE, 3)
        seen: Tensor = layers[0].seen(rose, torch.ones(1, 1))  # type: ignore[operator]
    return float(sum(loss for loss, _ in results) / sum(count for _, count in results)), seen[0, 0].softmax(
        -1
    )


def test_it_learns_what_there_is_to_see(source: str) -> None:
    seeing, rose = held_out(source, images=True)
    blind, nothing = held_out(source, images=False)
    assert seeing < blind - 0.05
    assert rose[sorted(COLOURS).index("rose")] > 0.6
    torch.testing.assert_close(nothing, torch.full((3,), 1 / 3))


def test_data_tell_the_categories_of_what_is_trained_on(source: str) -> None:
    data = data_of(source, True)
    plain = build_data(
        source=source, seed=1, context=60, slots=6, micro_batch_size=2, micro_batches=1, categories=False
    )
    row, targets = data.micro_batch(1, 0)
    without, others = plain.micro_batch(1, 0)
    assert "category" not in without and torch.equal(targets, others)
    assert all(torch.equal(row[name], without[name]) for name in without)
    for b, packed in enumerate(data.order.rows(1, 0)):
        wanted = [sample * 7 % 3 for sample in packed.samples]
        assert row["category"][b].tolist() == wanted + [-1] * (6 - len(wanted))
    told, _ = data.held_out(0)
    assert bool((told["category"] == -1).all()), "nothing that is held out says what it is"
