"""Tokens as they come, into text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.serving.multipart import Part, parse
from jobs.serving.service import Service
from jobs.serving.text import TextStream

BYTES = Service("x", "completions", 10)


def shown(text: bytes, stop: list[str], cuts: int = 1) -> tuple[str, bool, int]:
    stream = TextStream(BYTES.decode_stream, stop)
    parts = "".join(stream.push(text[at : at + cuts]) for at in range(0, len(text), cuts))
    return parts + stream.finish(), stream.stopped, stream.tokens


def test_half_a_character_is_held_back() -> None:
    stream = TextStream(BYTES.decode_stream)
    assert [stream.push([byte]) for byte in "a\u00e9\U0001f600".encode()] == [
        "a",
        "",
        "\u00e9",
        "",
        "",
        "",
        "\U0001f600",
    ]


def test_what_is_no_text_is_replaced() -> None:
    assert shown(b"a\xffb", []) == ("a\ufffdb", False, 3)


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_end_exactly_where_they_begin(text: str, stop: list[str]) -> None:
    places = [(text.find(each), each) for each in stop if each in text]
    # the first that is complete ends the answer; of those complete at once the one that began first
    ends = [(place + len(each), place) for place, each in places]
    wanted = text[: min(place for end, place in ends if end == min(ends)[0])] if ends else text
    found, stopped, tokens = shown(text.encode(), stop)
    assert (found, stopped) == (wanted, bool(ends))
    assert tokens == (min(ends)[0] if ends else len(text))


@given(st.binary(max_size=60).filter(lambda content: b"\r\n--zz" not in content), st.text("xyz", max_size=5))
def test_forms_come_back_as_they_were(content: bytes, filename: str) -> None:
    body = (
        b'--zz\r\nContent-Disposition: form-data; name="image"; filename="%s"\r\n'
        b"Content-Type: image/png\r\n\r\n%s\r\n--zz\r\n"
        b'Content-Disposition: form-data; name="language"\r\n\r\nfr\r\n--zz--\r\n'
        % (filename.encode(), content)
    )
    assert parse("multipart/form-data; boundary=zz", body) == [
        Part("image", filename, content),
        Part("language", None, b"fr"),
    ]


@pytest.mark.parametrize(
    "body",
    [b"", b"--zz", b"--zz--junk--", b"--zz\r\n\r\n\r\nx\r\n--zz--", b"--zz\r\nA: b\r\n\r\nx\r\n--zz--"],
)
def test_broken_forms_are_refused(body: bytes) -> None:
    if body == b"--zz--junk--":
        assert parse("multipart/form-data; boundary=zz", body) == []
        return
    with pytest.raises(ValueError, match="form"):
        parse("multipart/form-data; boundary=zz", body)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("head", [b"a" * 8000, b"a*" * 4000, b'a="' * 2600, rb'a="\"' * 1600, b"a=\\" * 2600])
def test_the_longest_heads_are_read_in_no_time(head: bytes) -> None:
    body = b"--zz\r\nContent-Disposition: %s\r\n\r\nx\r\n" % head
    good = b'--zz\r\nContent-Disposition: form-data; %s; name="n"\r\n\r\nx\r\n' % head.replace(b'"', b"")
    assert len(parse("multipart/form-data; boundary=zz", good * 32 + b"--zz--")) == 32
    with pytest.raises(ValueError, match="has no name"):
        parse("multipart/form-data; boundary=zz", good * 31 + body + b"--zz--")


def test_heads_and_headers_that_are_too_long_are_refused_unread() -> None:
    field = b'--zz\r\nContent-Disposition: form-data; name="n"; %s\r\n\r\nx\r\n--zz--'
    with pytest.raises(ValueError, match="longer than 8,192 bytes"):
        parse("multipart/form-data; boundary=zz", field % (b"a=b;" * 3000))
    with pytest.raises(ValueError, match="longer than 8,192 bytes"):
        parse("multipart/form-data; boundary=zz; " + "a=b;" * 3000, field % b"a=b")


def test_fields_are_counted_before_they_are_read() -> None:
    with pytest.raises(ValueError, match="more than 32 fields"):
        parse("multipart/form-data; boundary=zz", b"--zz\r\nnot a field\r\n" * 33 + b"--zz--")
    with pytest.raises(ValueError, match="has no header"):
        parse("multipart/form-data; boundary=zz", b"--zz\r\nnot a field\r\n" * 32 + b"--zz--")
