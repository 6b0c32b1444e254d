"""The engine against the plain model, token by token and bit by bit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from jobs.models.gpt import build
from jobs.serving.decoder import Decoder, decoder_of
from jobs.serving.engine import Engine, Token
from jobs.serving.generation import Generation, Prompt, Sampling
from jobs.serving.packed import forward
from jobs.serving.sampling import choose
from jobs.serving.scheduler import Limits

CONTEXT = 160


def layers_of(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    layers, _ = build(width=32, depth=2, heads=2, context=CONTEXT, vocabulary=61, tied=False)
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4.0)  # answers that do not repeat themselves at once
    return layers


def toy(seed: int = 0) -> Decoder:
    return decoder_of(layers_of(seed), torch.device("cpu"))


def expected(layers: Sequence[nn.Module], generation: Generation) -> tuple[list[int], str]:
    """The plain model on the whole sequence, again for every token."""
    tokens = list(generation.prompt.tokens)
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < generation.max_tokens:
            x = torch.tensor([tokens])
            for layer in layers:
                x = layer.eval()(x)
            token = choose(x[0, -1].numpy(), generation.sampling, len(tokens))
            if token in generation.end:
                return answer, "stop"
            tokens.append(token)
            answer.append(token)
    return answer, "length"


def drained(engine: Engine) -> list[Token]:
    told = []
    while not engine.is_idle:
        told += engine.step()
    return told


def answers(told: Sequence[Token]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for each in told:
        found.setdefault(each.request, [])
        if each.token is not None:
            found[each.request].append(each.token)
    return found


def generation(number: int, length: int, most: int, **other: object) -> Generation:
    draw = random.Random(number)
    prompt = Prompt(tuple(draw.randrange(61) for _ in range(length)))
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=number) if number % 2 else Sampling()
    return Generation(prompt, most, sampling, **other)  # type: ignore[arg-type]


@pytest.mark.parametrize("sequences", [1, 3, 16])
def test_answers_are_those_of_the_plain_model_without_a_cache(sequences: int) -> None:
    asked = [generation(n, length, most) for n, (length, most) in enumerate(
        [(1, 5), (7, 40), (63, 3), (64, 2), (65, 30), (3, 1), (20, 130), (120, 40), (8, 8)]
    )]  # fmt: skip
    engine = Engine(7, toy(), Limits(sequences=sequences, prompt_positions=70))
    for number, each in enumerate(asked):
        engine.submit(number, each)
    told = drained(engine)
    layers = layers_of(0)
    for number, each in enumerate(asked):
        tokens, _ = expected(layers, each)
        assert answers(told)[number] == tokens
    assert {each.version for each in told} == {7}
    assert engine.stats.running == engine.stats.waiting == 0


MINE = (generation(101, 70, 60), generation(102, 5, 65))


@cache
def alone() -> list[list[int]]:
    """The answers to ``MINE``, each by an engine that has nothing else to do."""
    told = []
    for each in MINE:
        engine = Engine(0, toy())
        engine.submit(0, each)
        told.append(answers(drained(engine))[0])
    return told


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 30), st.integers(0, 12)), max_size=9))
def test_an_answer_does_not_depend_on_its_neighbours(others: list[tuple[int, int, int]]) -> None:
    """Exactly: the logits' bits decide it, and sampling would show one that differs."""
    engine = Engine(0, toy(), Limits(sequences=6, prompt_positions=90))
    engine.submit(1000, MINE[0])
    told: list[Token] = []
    for number, (length, most, steps) in enumerate(others):
        engine.submit(number, generation(number, length, most))
        for _ in range(steps):
            told += engine.step()
    engine.submit(1001, MINE[1])
    told += drained(engine)
    assert [answers(told)[1000], answers(told)[1001]] == alone()


def test_logits_have_the_same_bits_in_any_company() -> None:
    decoder = toy()

    def logits(prompts: list[list[int]], steps: int) -> list[torch.Tensor]:
        cache, seen = decoder.new_cache(), []
        with torch.inference_mode():
            entries = [cache.insert(len(prompt)) for prompt in prompts]
            rows = [decoder.prompt_rows(Prompt(tuple(prompt))) for prompt in prompts]
            seen.append(forward(decoder, cache, list(zip(entries, rows, strict=True)), {})[0])
            for step in range(steps):
                for entry in entries:
                    cache.extend(entry)
                index = [e for _, pool in cache.pools for e in pool.entries].index(entries[0])
                seen.append(forward(decoder, cache, [], {id(e): step % 61 for e in entries})[index])
        return seen

    first = list(range(40))
    alone = logits([first], 90)
    company = logits([first, *([n] * n for n in range(1, 60, 4))], 90)
    for one, other in zip(alone, company, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_end_tokens_end_an_answer_and_are_not_told() -> None:
    layers = layers_of(0)
    free, _ = expected(layers, generation(2, 10, 30))
    end = frozenset({free[7]})
    asked = generation(2, 10, 30, end=end)
    engine = Engine(0, toy())
    engine.submit(5, asked)
    told = drained(engine)
    assert answers(told)[5] == free[: free.index(free[7])]
    assert told[-1].finish == "stop" and told[-1].token is None


@pytest.mark.parametrize("number", [10, 11])
@pytest.mark.parametrize("had", [0, 1, 17, 39, 40])
def test_a_continued_answer_is_the_one_that_was_begun(number: int, had: int) -> None:
    whole = generation(number, 30, 40)
    first = Engine(0, toy())
    first.submit(0, whole)
    tokens = answers(drained(first))[0]
    second = Engine(0, toy())
    for other in range(3):  # it joins others that are under way
        second.submit(100 + other, generation(200 + other, 9 + other, 60))
        second.step()
    second.submit(1, Generation(whole.prompt, 40, whole.sampling, given=tuple(tokens[:had])))
    told = drained(second)
    assert answers(told)[1] == tokens[had:]
    assert [each.finish for each in told if each.request == 1][-1] == "length"


def test_a_new_version_serves_new_requests_and_the_old_one_finishes_its_own() -> None:
    old, new = layers_of(0), layers_of(1)
    engine = Engine(10, decoder_of(old, torch.device("cpu")), Limits(sequences=2))
    running, waiting, later = generation(2, 5, 30), generation(4, 6, 30), generation(6, 7, 30)
    engine.submit(0, running)
    engine.submit(1, running)
    engine.submit(2, waiting)
    told = [token for _ in range(3) for token in engine.step()]
    engine.take_over(20, decoder_of(new, torch.device("cpu")))
    engine.submit(3, later)
    assert engine.versions == (10, 20)
    told += drained(engine)
    assert engine.versions == (20,)
    found = answers(told)
    assert found[0] == found[1] == expected(old, running)[0]
    assert found[2] == expected(new, waiting)[0] and found[3] == expected(new, later)[0]
    assert {t.version for t in told if t.request in (0, 1)} == {10}
    assert {t.version for t in told if t.request in (2, 3)} == {20}


def test_a_request_may_name_a_version_that_is_still_there() -> None:
    old = layers_of(0)
    engine = Engine(10, decoder_of(old, torch.device("cpu")))
    engine.submit(0, generation(2, 5, 30))
    engine.step()
    engine.take_over(20, toy(1))
    engine.submit(1, generation(4, 5, 30, version=10))
    engine.submit(2, generation(4, 5, 30, version=3))
    told = drained(engine)
    assert answers(told)[1] == expected(old, generation(4, 5, 30))[0]
    assert {t.version for t in told if t.request == 1} == {10}
    assert {t.version for t in told if t.request == 2} == {20}
    assert engine.versions == (20,)


def test_cancelled_requests_leave_no_trace() -> None:
    engine = Engine(0, toy(), Limits(sequences=3))
    for number in range(5):
        engine.submit(number, generation(number, 60 + number, 50))
    told = [token for _ in range(10) for token in engine.step()]
    for number in (1, 4, 77):
        engine.cancel(number)
    told += drained(engine)
    layers = layers_of(0)
    for number in (0, 2, 3):
        assert answers(told)[number] == expected(layers, generation(number, 60 + number, 50))[0]
    assert 4 not in answers(told) and len(answers(told)[1]) == 10


def test_what_does_not_fit_is_refused_with_the_remedy() -> None:
    engine = Engine(0, toy())
    with pytest.raises(ValueError, match="context is 160: shorten the prompt or lower max_tokens"):
        engine.submit(0, generation(0, 150, 11))
    with pytest.raises(ValueError, match="from 0 to 60 only"):
        engine.submit(0, Generation(Prompt((61,)), 3))
    with pytest.raises(ValueError, match="at least one token"):
        Prompt(())
    with pytest.raises(ValueError, match="max_tokens is 0"):
        Generation(Prompt((1,)), 0)
    assert engine.is_idle


def test_layers_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be served"):
        decoder_of([nn.Linear(2, 2), nn.Linear(2, 2)], torch.device("cpu"))


def test_every_order_of_arrival_gives_the_same_answers() -> None:
    asked = {number: generation(number, 5 + 30 * number, 20) for number in range(4)}
    seen = set()
    for arrivals in itertools.permutations(asked):
        engine = Engine(0, toy(), Limits(sequences=3))
        for number in arrivals:
            engine.submit(number, asked[number])
        seen.add(tuple(tuple(answers(drained_once)[n]) for drained_once in [drained(engine)] for n in asked))
    assert len(seen) == 1
