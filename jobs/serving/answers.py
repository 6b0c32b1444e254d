"""An answer in the making, and how it is told: OpenAI's completions, and captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from actors.serving import Piece
from jobs.serving.text import TextStream


class Answer:
    """``finish`` is None until the answer is complete; ``version`` is that of the model that gives it."""

    def __init__(
        self,
        decode_stream: Callable[[Iterable[int]], Iterator[str]],
        prompt_tokens: int,
        stop: Sequence[str],
    ) -> None:
        self._text = TextStream(decode_stream, stop)
        self.prompt_tokens = prompt_tokens
        self.version: int | None = None
        self.finish: str | None = None

    @property
    def tokens(self) -> int:
        return self._text.tokens

    def take(self, piece: Piece) -> str:
        """The text that may be shown now."""
        self.version = piece.version
        shown = self._text.push(piece.tokens)
        if self._text.stopped:
            self.finish = "stop"
        elif piece.finish is not None:
            self.finish = piece.finish
            shown += self._text.finish()
        return shown

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
        }


def completion_format(model: str) -> Callable[..., dict[str, Any]]:
    """OpenAI's ``text_completion`` objects; the last one of a stream has the counts."""

    def described(
        identity: str, created: int, answer: Answer, text: str, *, final: bool = False, whole: bool = False
    ) -> dict[str, Any]:
        choice = {
            "index": 0,
            "text": text,
            "logprobs": None,
            "finish_reason": answer.finish if final else None,
        }
        return {
            "id": identity,
            "object": "text_completion",
            "created": created,
            "model": model,
            "checkpoint": answer.version,
            "choices": [choice],
            **({"usage": answer.usage()} if final else {}),
        }

    return described


def caption_format(model: str) -> Callable[..., dict[str, Any]]:
    """``caption`` of a whole answer, ``text`` of a part."""

    def described(
        identity: str, created: int, answer: Answer, text: str, *, final: bool = False, whole: bool = False
    ) -> dict[str, Any]:
        return {
            "id": identity,
            "created": created,
            "model": model,
            "checkpoint": answer.version,
            "caption" if whole else "text": text,
            **({"finish_reason": answer.finish, "usage": answer.usage()} if final else {}),
        }

    return described
