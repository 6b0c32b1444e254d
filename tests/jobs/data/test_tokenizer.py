"""Captions to ids and back: nothing is lost, and no half character is ever shown."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.data.tokenizer import CaptionTokenizer

LANGUAGES = ("ru", "en", "ja")
CAPTIONS = [
    "a red apple",
    "a green apple",
    "красное яблоко",
    "赤いりんご",
    "a red pear",
    "the apple tree",
] * 3
TOKENIZERS = (CaptionTokenizer(LANGUAGES), CaptionTokenizer.train(CAPTIONS, LANGUAGES, 300))


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda each: each.kind)
def test_specials_come_first(tokenizer: CaptionTokenizer) -> None:
    assert (tokenizer.pad, tokenizer.begin, tokenizer.end) == (0, 1, 2)
    assert tokenizer.languages == ("en", "ja", "ru")
    assert [tokenizer.language(code) for code in tokenizer.languages] == [3, 4, 5]
    assert all(6 <= each < tokenizer.vocabulary for each in tokenizer.encode("apple яблоко"))
    assert tokenizer.decode([1, 3, *tokenizer.encode("apple"), 2, 0]) == "apple"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_comes_back(text: str) -> None:
    for tokenizer in TOKENIZERS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.decode_stream(iter(ids))) == text


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 50))
def test_prefix_never_shows_half_a_character(text: str, length: int) -> None:
    for tokenizer in TOKENIZERS:
        part = tokenizer.decode(tokenizer.encode(text)[:length])
        assert text.startswith(part)


@given(st.lists(st.integers(0, 290)))
def test_any_ids_can_be_shown(ids: list[int]) -> None:
    tokenizer = TOKENIZERS[1]
    ids = [each % tokenizer.vocabulary for each in ids]
    assert len(list(tokenizer.decode_stream(ids))) == len(ids)
    tokenizer.decode(ids).encode()


def test_merges_shorten_and_the_vocabulary_is_kept() -> None:
    plain, merged = TOKENIZERS
    assert len(merged.encode("a red apple")) < len(plain.encode("a red apple")) == 11
    assert plain.vocabulary == 3 + 3 + 256 and merged.vocabulary == 300


def test_training_does_not_depend_on_order() -> None:
    again = CaptionTokenizer.train(reversed(CAPTIONS), reversed(LANGUAGES), 300)
    assert again.to_json() == TOKENIZERS[1].to_json()


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda each: each.kind)
def test_tokenizer_is_kept(tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    for copy in (CaptionTokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy == tokenizer and hash(copy) == hash(tokenizer)
        assert copy.encode("a red яблоко") == tokenizer.encode("a red яблоко")
    assert TOKENIZERS[0] != TOKENIZERS[1]


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match='"de" is not known: choose from en, ja, ru'):
        TOKENIZERS[0].language("de")
    with pytest.raises(ValueError, match="at least 262"):
        CaptionTokenizer.train(CAPTIONS, LANGUAGES, 261)
    with pytest.raises(ValueError, match="token 262 does not exist"):
        TOKENIZERS[0].decode([262])
    for text in ("", "[]", "{}", "nothing", '{"format": 2, "languages": [], "merges": null}'):
        with pytest.raises(ValueError, match="curate the set again"):
            CaptionTokenizer.from_json(text)
