"""Captions as token ids: bytes, or byte-level BPE, both after the special tokens.

Ids: ``pad`` 0, ``begin`` 1, ``end`` 2, one for each language in alphabetical order, then the text's.
Text is never lost: every string that UTF-8 can hold comes back from its ids.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Kind = Literal["bytes", "bpe"]

_FORMAT = 1
_SPECIALS = 3
_BYTES = 256


class CaptionTokenizer:
    """``languages`` are the codes that have a token; ``kind`` is "bytes" or "bpe". Picklable."""

    pad, begin, end = range(_SPECIALS)

    def __init__(self, languages: Iterable[str], merges: str | None = None) -> None:
        """``merges`` is the JSON of a byte-level BPE ``tokenizers.Tokenizer``; None for bytes."""
        self.languages: tuple[str, ...] = tuple(sorted(set(languages)))
        self.kind: Kind = "bytes" if merges is None else "bpe"
        self._merges = merges
        self._first = _SPECIALS + len(self.languages)
        self._numbers = {code: _SPECIALS + place for place, code in enumerate(self.languages)}
        if merges is None:
            self._bpe = None
            self._pieces = tuple(bytes([value]) for value in range(_BYTES))
        else:
            self._bpe = Tokenizer.from_str(merges)
            self._pieces = _byte_pieces(self._bpe)

    @classmethod
    def train(cls, captions: Iterable[str], languages: Iterable[str], vocabulary: int) -> CaptionTokenizer:
        """Byte-level BPE (Sennrich et al., ACL 2016; bytes as in GPT-2) over ``captions``, with at most
        ``vocabulary`` ids in all. A pure function of the captions as a multiset.

        Raises ValueError if ``vocabulary`` does not hold the specials, the languages and all bytes.
        """
        codes = sorted(set(languages))
        room = vocabulary - _SPECIALS - len(codes)
        if room < _BYTES:
            raise ValueError(
                f"a vocabulary of {vocabulary} has no room for {_SPECIALS + len(codes)} special tokens and "
                f"{_BYTES} bytes: make it at least {_SPECIALS + len(codes) + _BYTES}"
            )
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=room,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        bpe.train_from_iterator(sorted(captions), trainer)
        return cls(codes, bpe.to_str())

    @property
    def vocabulary(self) -> int:
        """How many ids there are, specials and languages included."""
        return self._first + len(self._pieces)

    def language(self, code: str) -> int:
        """The id of a language's token. Raises ValueError for a language that has none."""
        try:
            return self._numbers[code]
        except KeyError:
            known = ", ".join(self.languages) or "none at all"
            raise ValueError(f'the language "{code}" is not known: choose from {known}') from None

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, with no special among them."""
        if self._bpe is None:
            return [self._first + value for value in text.encode()]
        return [self._first + each for each in self._bpe.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; specials have none. A character whose last bytes are missing is left out."""
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """A piece of text for every id, as the ids come; ``""`` while a character is not complete.

        What is no UTF-8 comes out as U+FFFD. Raises ValueError for an id that does not exist.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for each in ids:
            yield decoder.decode(self._piece(each))

    def _piece(self, number: int) -> bytes:
        if not 0 <= number < self.vocabulary:
            raise ValueError(f"the token {number} does not exist: the vocabulary has {self.vocabulary}")
        return self._pieces[number - self._first] if number >= self._first else b""

    def to_json(self) -> str:
        """The same text for equal tokenizers."""
        return json.dumps(
            {
                "format": _FORMAT,
                "kind": self.kind,
                "languages": self.languages,
                "merges": None if self._merges is None else json.loads(self._merges),
            },
            ensure_ascii=False,
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str) -> CaptionTokenizer:
        """Raises ValueError for what ``to_json`` did not write."""
        try:
            given: Any = json.loads(text)
            form, languages, merges = given["format"], given["languages"], given["merges"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"this is no tokenizer of a curated set ({error}): curate the set again"
            ) from None
        if form != _FORMAT:
            raise ValueError(f"the tokenizer has format {form}, not {_FORMAT}: curate the set again")
        return cls(languages, None if merges is None else json.dumps(merges, ensure_ascii=False))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> CaptionTokenizer:
        """Raises ValueError for a file that is no tokenizer."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def __reduce__(self) -> tuple[Any, ...]:
        return CaptionTokenizer, (self.languages, self._merges)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CaptionTokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())


def _byte_pieces(bpe: Tokenizer) -> tuple[bytes, ...]:
    values = _characters()
    names = (bpe.id_to_token(number) for number in range(bpe.get_vocab_size()))
    return tuple(bytes(values[character] for character in name or "") for name in names)


@lru_cache(maxsize=1)
def _characters() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for: printable ones of Latin-1 for
    themselves, the other bytes, in order, for the characters from U+0100 on (GPT-2's encoder.py)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(_BYTES) if value not in set(plain)]
    return {chr(value): value for value in plain} | {
        chr(_BYTES + place): value for place, value in enumerate(others)
    }
