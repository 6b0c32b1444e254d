"""Tokens as they come, into text as it may be shown: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence


class TextStream:
    """For one answer. ``stop`` strings end it and are not part of it; what is no UTF-8 becomes U+FFFD."""

    def __init__(
        self, decode_stream: Callable[[Iterable[int]], Iterator[str]], stop: Sequence[str] = ()
    ) -> None:
        """``decode_stream`` gives a piece of text for every token, as it takes them."""
        self._stop = tuple(stop)
        self._coming: deque[int] = deque()
        self._pieces = decode_stream(iter(self._coming.popleft, None))
        self._held = ""
        self.tokens = 0
        self.stopped = False

    def push(self, tokens: Iterable[int]) -> str:
        """What may be shown now. Tokens after a stop string are not counted."""
        shown = ""
        for token in tokens:
            if self.stopped:
                break
            self.tokens += 1
            self._coming.append(token)
            shown += self._show(next(self._pieces))
        return shown

    def finish(self) -> str:
        """The rest, once the answer is complete: what might have become a stop string."""
        rest, self._held = self._held, ""
        return rest

    def _show(self, text: str) -> str:
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        # the longest end that may yet become a stop string is held back
        keep = max(
            (
                length
                for stop in self._stop
                for length in range(min(len(stop) - 1, len(self._held)), 0, -1)
                if self._held.endswith(stop[:length])
            ),
            default=0,
        )
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown
