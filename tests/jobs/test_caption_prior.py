"""The n-gram prior of captions: a distribution, by its formula, fitted to the training captions alone."""

from __future__ import annotations

from math import exp, log

import pytest

from jobs.captions.prior import Caption, CaptionPrior, best_prior, told_prior

VOCABULARY, END = 6, 2
TRAIN = [("en", [3, 4]), ("en", [3, 5]), ("de", [5])]


def probability(prior: CaptionPrior, language: str, tokens: list[int]) -> float:
    loss, count = prior.loss([(language, tokens)])
    return exp(-loss * count)


def test_by_hand() -> None:
    """English tokens are 3 4 end, 3 5 end: after any, 6 tokens of 4 kinds; after the beginning, 3 twice."""
    prior = CaptionPrior(TRAIN, order=1, vocabulary=VOCABULARY, end=END)

    def alone(count: int) -> float:
        return (count + 4 / VOCABULARY) / (6 + 4)

    first = (2 + 1 * alone(2)) / (2 + 1)
    second = (1 + 2 * alone(1)) / (2 + 2)
    end = (1 + 1 * alone(2)) / (1 + 1)
    assert probability(prior, "en", [3, 4]) == pytest.approx(first * second * end)
    unseen_context = alone(2)  # nothing followed a 1: what comes anywhere
    loss, count = prior.loss([("en", [1])])
    assert loss == pytest.approx(-(log((0 + alone(0)) / 3) + log(unseen_context)) / 2) and count == 2


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_contexts_probabilities_add_up(order: int) -> None:
    prior = CaptionPrior(TRAIN, order=order, vocabulary=VOCABULARY, end=END)
    for context in ([-1, -1], [-1, 3], [3, 4], [4, 1]):
        of_token = [
            prior.probability("en", tuple(context[2 - order :]), token) for token in range(VOCABULARY)
        ]
        assert sum(of_token) == pytest.approx(1) and min(of_token) > 0


def test_languages_are_apart() -> None:
    prior = CaptionPrior(TRAIN, order=1, vocabulary=VOCABULARY, end=END)
    assert probability(prior, "de", [5]) > probability(prior, "en", [5])
    assert prior.loss([("fr", [3])])[0] == pytest.approx(log(VOCABULARY)), "nothing is known of it"


def test_strength_is_how_much_a_shorter_context_counts() -> None:
    prior = CaptionPrior(TRAIN, order=0, vocabulary=VOCABULARY, end=END)
    for strength in (1.0, 3.0):
        of_token = [prior.probability("en", (), token, strength) for token in range(VOCABULARY)]
        assert of_token[3] == pytest.approx((2 + strength * 4 / VOCABULARY) / (6 + strength * 4))
        assert sum(of_token) == pytest.approx(1)


def test_the_best_smoothing_is_found() -> None:
    held_out = [("en", [0, 1])]
    strengths = (1.0, 4.0)
    found, order, strength = best_prior(TRAIN, held_out, vocabulary=VOCABULARY, end=END, strengths=strengths)
    assert strength == 4.0
    prior = CaptionPrior(TRAIN, order=order, vocabulary=VOCABULARY, end=END)
    assert found == prior.loss(held_out, 4.0)[0] < prior.loss(held_out)[0], "what is new is expected more"


def test_the_best_order_is_the_prior() -> None:
    held_out = [("en", [3, 4])]
    losses = [
        CaptionPrior(TRAIN, order=order, vocabulary=VOCABULARY, end=END).loss(held_out)[0]
        for order in range(5)
    ]
    assert best_prior(TRAIN, held_out, vocabulary=VOCABULARY, end=END) == (
        min(losses),
        losses.index(min(losses)),
        1.0,
    )


TOLD = [("fish", ("en", [3, 4])), ("fish", ("en", [3, 4])), ("bird", ("en", [3, 5])), ("bird", ("de", [5]))]


def told(train: list[tuple[str, Caption]], held_out: list[tuple[str, Caption]]) -> float | None:
    return told_prior(train, held_out, vocabulary=VOCABULARY, end=END, order=1, strength=2.0)


def test_a_category_tells_what_is_said_of_it() -> None:
    rightly: list[tuple[str, Caption]] = [("fish", ("en", [3, 4])), ("bird", ("en", [3, 5]))]
    wrongly: list[tuple[str, Caption]] = [("bird", ("en", [3, 4])), ("fish", ("en", [3, 5]))]
    right, wrong, strange = (
        told(TOLD, each) for each in (rightly, wrongly, [("cow", caption) for _, caption in rightly])
    )
    assert right is not None and wrong is not None
    prior = CaptionPrior([caption for _, caption in TOLD], order=1, vocabulary=VOCABULARY, end=END)
    untold, _ = prior.loss([caption for _, caption in rightly], 2.0)
    assert right < untold < wrong
    assert strange == pytest.approx(untold), "nothing is known of that category"
    assert told([("fish", caption) for _, caption in TOLD], rightly) is None, "one category tells nothing"


def test_what_is_told_counts_by_the_same_rule() -> None:
    """After nothing (order 0) a general prior says 0.5 of a token; of a category 2 of 3 tokens were that one,
    and there are 2 kinds of them: (2 + 2 pull / 2) / (3 + 2 pull)."""
    special = CaptionPrior([("en fish", [3, 3])], order=0, vocabulary=VOCABULARY, end=END)
    for pull in (1.0, 4.0):
        found = special.probability("en fish", (), 3, pull, 0.5)
        assert found == pytest.approx((2 + pull * 2 * 0.5) / (3 + pull * 2))
