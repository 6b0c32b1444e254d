"""``multipart/form-data`` (RFC 7578) of a body that is there as a whole."""

from __future__ import annotations

import re
from dataclasses import dataclass

MOST_PARTS = 32
MOST_HEAD = 8192
"""Bytes of a field's headers, and of the header that names the boundary."""

# the lookbehind keeps a long word without "=" from being read again from each of its letters on
_PARAMETER = re.compile(r'(?<![a-z*])([a-z*]+)=(?:"((?:[^"\\]|\\.)*)"|([^;\s"]+))', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Part:
    """One field; ``filename`` is None where it is not a file."""

    name: str
    filename: str | None
    content: bytes


def parse(content_type: str, body: bytes) -> list[Part]:
    """The fields in their order. ``content_type`` is the header's value. Raises ValueError."""
    if len(content_type) > MOST_HEAD:
        raise ValueError(f"the Content-Type header of the form is longer than {MOST_HEAD:,} bytes")
    boundary = dict(_parameters(content_type)).get("boundary", "")
    if not 1 <= len(boundary) <= 70:
        raise ValueError("the Content-Type header of the form names no boundary")
    delimiter = b"\r\n--" + boundary.encode("latin-1", errors="replace")
    pieces = (b"\r\n" + body).split(delimiter, MOST_PARTS + 2)
    if len(pieces) > MOST_PARTS + 2:  # what is before the first field and after the last are no fields
        raise ValueError(f"the form has more than {MOST_PARTS} fields")
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise ValueError("the form is cut short or its boundary is wrong: its last delimiter is missing")
    return [_part(piece) for piece in pieces[1:-1]]


def _part(piece: bytes) -> Part:
    head, blank, content = piece.partition(b"\r\n\r\n")
    if not blank:
        raise ValueError("a field of the form has no header")
    if len(head) > MOST_HEAD:
        raise ValueError(f"the headers of a field of the form are longer than {MOST_HEAD:,} bytes")
    for line in head.split(b"\r\n"):
        key, _, value = line.decode("utf-8", errors="replace").partition(":")
        if key.strip().lower() == "content-disposition":
            given = dict(_parameters(value))
            if "name" in given:
                return Part(given["name"], given.get("filename"), content)
    raise ValueError("a field of the form has no name")


def _parameters(value: str) -> list[tuple[str, str]]:
    return [
        (key.lower(), re.sub(r"\\(.)", r"\1", quoted) if quoted else plain)
        for key, quoted, plain in _PARAMETER.findall(value)
    ]
