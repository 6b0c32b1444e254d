"""The prior as tables: the report's probabilities, whole or a token at a time, without one's own caption."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.captions.prior import BEFORE, Caption, CaptionPrior
from jobs.models.caption_prior import PriorTable

VOCABULARY, END = 12, 2
LANGUAGES = {"de": 3, "en": 4}
TRAIN: list[Caption] = [
    ("en", [5, 6, 7]),
    ("en", [5, 6]),
    ("en", [5, 6, 5, 6, 7]),
    ("de", [8, 9]),
    ("de", [8, 9, 5, 6, 7, 8]),
    ("de", [8, 9]),
]
NEW: list[Caption] = [("en", [5, 6, 8]), ("de", [10]), ("de", [9, 5, 6, 7]), ("en", [])]


def prior_of(captions: list[Caption], order: int) -> CaptionPrior:
    return CaptionPrior(captions, order=order, vocabulary=VOCABULARY, end=END)


def table_of(captions: list[Caption], order: int) -> PriorTable:
    texts = [(LANGUAGES[language], *tokens) for language, tokens in captions]
    return PriorTable(texts, order=order, vocabulary=VOCABULARY, end=END)


def packed(rows: list[list[Caption]], context: int = 30) -> dict[str, Tensor]:
    row = {
        "tokens": torch.zeros(len(rows), context, dtype=torch.int64),
        "segment": torch.full((len(rows), context), -1),
        "position": torch.zeros(len(rows), context, dtype=torch.int64),
    }
    for b, captions in enumerate(rows):
        begin = 0
        for slot, (language, tokens) in enumerate(captions):
            text = [LANGUAGES[language], *tokens]
            here = slice(begin, begin + len(text))
            row["tokens"][b, here] = torch.tensor(text)
            row["segment"][b, here] = slot
            row["position"][b, here] = torch.arange(len(text))
            begin = here.stop
    return row


def expected(prior: CaptionPrior, caption: Caption) -> Tensor:
    """Every token's log-probability at every place, by the report's own formula."""
    language, tokens = caption
    padded = (*[BEFORE] * prior.order, *tokens)
    contexts = [padded[place : place + prior.order] for place in range(len(tokens) + 1)]
    return torch.tensor(
        [[log(prior.probability(language, each, token)) for token in range(VOCABULARY)] for each in contexts]
    )


@pytest.mark.parametrize("order", [0, 1, 3])
def test_it_is_the_prior_of_the_report(order: int) -> None:
    table = table_of(TRAIN, order).eval()
    rows = [TRAIN[:3] + NEW[:1], NEW[1:]]
    found_BTV = table(packed(rows))
    prior = prior_of(TRAIN, order)
    for found_TV, captions in zip(found_BTV, rows, strict=True):
        wanted_TV = torch.cat([expected(prior, caption) for caption in captions])
        torch.testing.assert_close(found_TV[: len(wanted_TV)], wanted_TV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_training_leaves_a_caption_out_of_its_own_prior(order: int) -> None:
    found_BTV = table_of(TRAIN, order).train()(packed([TRAIN[:4], TRAIN[4:]]))
    for found_TV, places in zip(found_BTV, (range(4), range(4, 6)), strict=True):
        wanted_TV = torch.cat(
            [expected(prior_of(TRAIN[:each] + TRAIN[each + 1 :], order), TRAIN[each]) for each in places]
        )
        torch.testing.assert_close(found_TV[: len(wanted_TV)], wanted_TV, atol=1e-5, rtol=1e-5)


def test_captions_that_were_not_counted_may_be_trained_on() -> None:
    found_BTV = table_of(TRAIN, 3).train()(packed([NEW]))
    assert bool(torch.isfinite(found_BTV).all())
    torch.testing.assert_close(found_BTV.exp().sum(-1), torch.ones(found_BTV.shape[:2]))


def test_tables_are_constants_of_whole_numbers() -> None:
    """Whatever precision an engine turns a model's floats to, counts stay what they are."""
    table = table_of(TRAIN, 3)
    before: dict[str, Any] = {name: buffer.clone() for name, buffer in table.named_buffers()}
    assert before and not table.state_dict() and {each.dtype for each in before.values()} == {torch.int64}
    table.train()(packed([TRAIN]))
    assert all(torch.equal(buffer, before[name]) for name, buffer in table.named_buffers())
