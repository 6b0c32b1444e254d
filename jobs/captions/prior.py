"""What captions alone tell: a smoothed n-gram model of the training captions, one for each language.

Interpolated by Witten and Bell's rule (Chen and Goodman, "An Empirical Study of Smoothing Techniques for
Language Modeling", 1999, section 2.6): after a context that was followed n times, by u different tokens, a
token seen c times has probability (c + u p) / (n + u), with p that after the context without its first
token, and at the end 1 / vocabulary. With a ``strength`` s, s u takes the place of u: Witten and Bell trust
long contexts in few captions too much, and what is to be beaten is not to be beaten for that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from math import log
from typing import Any

Caption = tuple[str, Sequence[int]]
"""Its language and its tokens."""

ORDERS = range(5)
"""How many tokens back: the best of these is the prior, so that it is not beaten for a poor choice."""

STRENGTHS = (1.0, 2.0, 3.0, 4.0)
"""Of which the best makes the prior that is smoothed best."""

PULLS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Strengths with which what is said of all categories weighs against what is said of one."""

BEFORE = -1
"""In the place of a token before the first one."""


class CaptionPrior:
    """Fitted to ``captions``, over ``vocabulary`` tokens of which ``end`` ends each; looks ``order`` back."""

    def __init__(self, captions: Iterable[Caption], *, order: int, vocabulary: int, end: int) -> None:
        self.order, self._vocabulary, self._end = order, vocabulary, end
        self._following: dict[tuple[str, tuple[int, ...]], Counter[int]] = defaultdict(Counter)
        for language, tokens in captions:
            for context, token in self.places(tokens):
                for begin in range(order + 1):
                    self._following[language, context[begin:]][token] += 1

    def loss(self, captions: Iterable[Caption], strength: float = 1.0) -> tuple[float, int]:
        """(mean loss in nats per token, number of tokens), each caption's end counted as one."""
        losses = [
            -log(self.probability(language, context, token, strength))
            for language, tokens in captions
            for context, token in self.places(tokens)
        ]
        return sum(losses) / len(losses), len(losses)

    def places(self, tokens: Sequence[int]) -> Iterable[tuple[tuple[int, ...], int]]:
        padded = (*[BEFORE] * self.order, *tokens, self._end)
        for place in range(self.order, len(padded)):
            yield padded[place - self.order : place], padded[place]

    def probability(
        self,
        language: str,
        context: tuple[int, ...],
        token: int,
        strength: float = 1.0,
        beyond: float | None = None,
    ) -> float:
        """That ``token`` follows the ``order`` tokens ``context`` (-1 before the first). ``beyond`` is how
        likely it is by what is not counted here (None: as any other)."""
        probability = 1 / self._vocabulary if beyond is None else beyond
        for begin in range(self.order, -1, -1):
            if (counts := self._following.get((language, context[begin:]))) is not None:
                shorter = strength * len(counts)
                probability = (counts[token] + shorter * probability) / (counts.total() + shorter)
        return probability


def best_prior(
    train: Sequence[Caption],
    held_out: Sequence[Caption],
    *,
    vocabulary: int,
    end: int,
    strengths: Sequence[float] = (1.0,),
) -> tuple[float, int, float]:
    """(held-out loss in nats per token, order, strength) of the order and strength that are best on
    ``held_out``."""
    priors = [CaptionPrior(train, order=order, vocabulary=vocabulary, end=end) for order in ORDERS]
    return min((prior.loss(held_out, each)[0], prior.order, each) for prior in priors for each in strengths)


def told_prior(
    train: Sequence[tuple[str, Caption]],
    held_out: Sequence[tuple[str, Caption]],
    *,
    vocabulary: int,
    end: int,
    order: int,
    strength: float,
) -> float | None:
    """Held-out loss in nats per token, given (category, caption), of a prior that is told each caption's
    category: what follows in captions of that alone is interpolated with what follows in all, by the same
    rule and with the strength that is best on ``held_out``. It says what the category is worth to one who
    counts; None where all are of one."""
    if len({category for category, _ in train}) < 2:
        return None
    about: Any = {"order": order, "vocabulary": vocabulary, "end": end}
    general = CaptionPrior([caption for _, caption in train], **about)
    special = CaptionPrior(
        [(_labelled(category, language), tokens) for category, (language, tokens) in train], **about
    )
    places = [
        (
            _labelled(category, language),
            context,
            token,
            general.probability(language, context, token, strength),
        )
        for category, (language, tokens) in held_out
        for context, token in general.places(tokens)
    ]

    def loss(pull: float) -> float:
        probabilities = (
            special.probability(label, context, token, pull, beyond)
            for label, context, token, beyond in places
        )
        return -sum(map(log, probabilities)) / len(places)

    return min(map(loss, PULLS))


def _labelled(category: str, language: str) -> str:
    return f"{language} {category}"
