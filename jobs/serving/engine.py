"""Generates many answers at once with one or more versions of a model: continuous batching.

``Engine.step`` is one iteration: admit, one packed forward per version, choose tokens, retire. A sequence
stays with the version that it began with; a version that is no longer the newest is let go of when its
last sequence ends.

What is guaranteed: an answer's tokens are a function of (version, prompt, sampling) alone. They depend
neither on the other sequences nor on the iteration in which one came (see ``packed``), and an answer that
is continued elsewhere is computed again from its prompt with the same shapes, so that the same bits come
out on the same kind of processor; what its client has already seen (``given``) is taken as it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jobs.serving.cache import Entry, KeyValueCache
from jobs.serving.decoder import Decoder, Told
from jobs.serving.generation import Finish, Generation
from jobs.serving.packed import forward, order
from jobs.serving.sampling import choose
from jobs.serving.scheduler import Demand, Limits, admitted


@dataclass(frozen=True, slots=True)
class Token:
    """One more token of the answer to ``request``; ``token`` None: the answer ended without one more."""

    request: int
    version: int
    token: int | None
    finish: Finish | None


@dataclass(eq=False, slots=True)
class _Sequence:
    request: int
    generation: Generation
    version: int
    prompt_positions: int
    entry: Entry | None = None
    tokens: list[int] = field(default_factory=list)
    seen_C: Tensor | None = None

    @property
    def demand(self) -> Demand:
        most = self.prompt_positions + self.generation.max_tokens
        return Demand(self.prompt_positions, most)


@dataclass(frozen=True, slots=True)
class _Version:
    decoder: Decoder
    cache: KeyValueCache


@dataclass(frozen=True, slots=True)
class EngineStats:
    """``iterations`` and ``tokens`` (generated, told again or not) since the start; the others are of now."""

    version: int
    versions: int
    waiting: int
    running: int
    iterations: int
    tokens: int
    prompt_positions: int


class Engine:
    """For one thread. ``version`` is the number of optimizer steps behind ``decoder``."""

    def __init__(self, version: int, decoder: Decoder, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._newest = version
        self._versions = {version: _Version(decoder, decoder.new_cache())}
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}
        self._iterations = self._tokens = self._prompt_positions = 0

    @property
    def version(self) -> int:
        """The newest version, which new requests get."""
        return self._newest

    @property
    def versions(self) -> tuple[int, ...]:
        return tuple(sorted([*self._versions]))  # copied at once: other threads may ask

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            version=self._newest,
            versions=len(self._versions),
            waiting=len(self._waiting),
            running=len(self._running),
            iterations=self._iterations,
            tokens=self._tokens,
            prompt_positions=self._prompt_positions,
        )

    def take_over(self, version: int, decoder: Decoder) -> None:
        """New requests, and those that wait, get ``decoder`` from now on, if it is newer than what there is;
        an older one is for requests that name it."""
        if version in self._versions:
            return
        self._versions[version] = _Version(decoder, decoder.new_cache())
        if version > self._newest:
            self._newest = version
            for sequence in self._waiting:
                if sequence.generation.version is None:
                    sequence.version = version
            self._let_go()

    def submit(self, request: int, generation: Generation) -> None:
        """Takes a request in; its tokens come from ``step`` under the number ``request``.

        Raises ValueError if it does not fit into the model's context or has tokens the model does not know.
        """
        assert request not in self._running and all(request != each.request for each in self._waiting)
        wanted = generation.version
        version = wanted if wanted is not None and wanted in self._versions else self._newest
        decoder = self._versions[version].decoder
        decoder.check(generation.prompt)
        positions = decoder.positions(generation.prompt)
        if positions + generation.max_tokens > decoder.context:
            raise ValueError(
                f"the prompt has {positions} tokens and max_tokens is {generation.max_tokens}, but the "
                f"model's context is {decoder.context}: shorten the prompt or lower max_tokens"
            )
        self._waiting.append(_Sequence(request, generation, version, positions))

    def cancel(self, request: int) -> None:
        """Forgets a request; nothing happens if it is not there (any more)."""
        self._waiting = deque(each for each in self._waiting if each.request != request)
        sequence = self._running.pop(request, None)
        if sequence is not None and sequence.entry is not None:
            self._versions[sequence.version].cache.remove(sequence.entry)
            self._let_go()

    @torch.no_grad()
    def step(self) -> list[Token]:
        """One iteration. Nothing where there is nothing to do."""
        new = self._admit()
        told: list[Token] = []
        for version, held in list(self._versions.items()):
            going = [each for each in self._running.values() if each.version == version]
            if going:
                told += self._iterate(held, going, [each for each in new if each.version == version])
        self._iterations += bool(self._running)
        for token in told:
            if token.finish is not None:
                self.cancel(token.request)
        return told

    def _admit(self) -> list[_Sequence]:
        running = [each.demand for each in self._running.values()]
        count = admitted([each.demand for each in self._waiting], running, self._limits)
        new = [self._waiting.popleft() for _ in range(count)]
        self._running.update((each.request, each) for each in new)
        return new

    def _iterate(self, held: _Version, going: list[_Sequence], new: list[_Sequence]) -> list[Token]:
        cache, newest = held.cache, {}
        for sequence in going:
            if sequence.entry is not None:
                cache.extend(sequence.entry)
                newest[id(sequence.entry)] = sequence.tokens[-1]
        prompts = []
        for sequence in new:
            sequence.entry = cache.insert(sequence.prompt_positions)
            sequence.seen_C = held.decoder.seen(sequence.generation.prompt)
            prompts.append((sequence.entry, held.decoder.prompt_rows(sequence.generation.prompt)))
            self._prompt_positions += sequence.prompt_positions
        by_entry: Mapping[int, _Sequence] = {id(each.entry): each for each in going}
        ordered = [by_entry[id(entry)] for entry in order(cache, [entry for entry, _ in prompts])]
        texts: list[Told] = []
        if held.decoder.reads_texts:
            texts = [Told((*each.generation.prompt.tokens, *each.tokens), each.seen_C) for each in ordered]
        logits_NV = forward(held.decoder, cache, prompts, newest, texts).numpy()
        told = []
        for sequence, logits_V in zip(ordered, logits_NV, strict=True):
            generation, place = sequence.generation, len(sequence.tokens)
            self._tokens += 1
            if place < len(generation.given):
                token = generation.given[place]
            else:
                token = choose(logits_V, generation.sampling, sequence.prompt_positions + place)
            told += self._tell(sequence, token)
        return told

    def _tell(self, sequence: _Sequence, token: int) -> list[Token]:
        generation = sequence.generation
        if token in generation.end:
            return [Token(sequence.request, sequence.version, None, "stop")]
        sequence.tokens.append(token)
        finish: Finish | None = "length" if len(sequence.tokens) >= generation.max_tokens else None
        if len(sequence.tokens) > len(generation.given):
            return [Token(sequence.request, sequence.version, token, finish)]
        return [Token(sequence.request, sequence.version, None, finish)] if finish else []

    def _let_go(self) -> None:
        used = {each.version for each in (*self._running.values(), *self._waiting)}
        for version in list(self._versions):
            if version != self._newest and version not in used:
                del self._versions[version]
