"""Read data URLs as clients write them: RFC 2397, and what shells and browsers make of it. Pure functions.

``data:[type/subtype][;parameter=value]...;base64,DATA``. Taken beside that: any case, blanks, parameters that
hold commas (``codecs=avc1,opus``, as browsers record) or are quoted, and DATA wrapped into lines, in the
alphabet for URLs, with its special characters percent-encoded, or without padding. What is left is base64 as
decoders take it, or an error.

Everything is linear in the length. Of a URL's data there is one copy, and a second one while something in
them is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from string import ascii_letters, digits
from typing import NamedTuple

import pybase64

_MAX_HEADER = 4096
"""Characters in which the data must have begun."""
# Quoted text is passed over: what looks like the end of the header in there is not.
_QUOTED_OR_END = re.compile(r'"[^"]*"|(?:;|^data:)\s*base64\s*,', re.IGNORECASE)
_BLANKS = " \t\n\r\f\v"
_TO_STANDARD = str.maketrans("-_", "+/", _BLANKS)
_NOT_BASE64 = re.compile("[^A-Za-z0-9+/=]")
_ESCAPE = re.compile("%.{0,2}", re.DOTALL)
# Both alphabets, padding, the comma between pictures, blanks. Not "%": nothing is read twice.
_ESCAPABLE = {f"%{ord(c):02X}": c for c in "+/=,-_" + _BLANKS + ascii_letters + digits}
_PIECE = 1 << 16


class DataUrlError(ValueError):
    """A data URL that cannot be read; the message is one sentence for the user."""


class DataUrl(NamedTuple):
    """What a data URL holds."""

    media_type: str
    """Type and subtype in lower case, without parameters; empty where none is stated."""
    data: str
    """Base64 in the standard alphabet, without blanks or escapes; padding as it came, see `padded`.

    Several files are joined by commas. That it is base64 at all shows when it is decoded.
    """


def read_data_url(url: str) -> DataUrl:
    """Take a data URL apart.

    Args:
        url: begins with ``data:`` in any case.

    Raises:
        DataUrlError: it does not state base64, or holds characters that no base64 has.
    """
    ends = _QUOTED_OR_END.finditer(url, 0, _MAX_HEADER)
    end = next((match for match in ends if not match.group().startswith('"')), None)
    if end is None:
        raise DataUrlError("The data URL does not state base64: it must look like data:video/mp4;base64,AAAA.")
    media_type = url[len("data:") : end.start()].partition(";")[0]
    data = _standard(url, end.end())
    if not data.isascii():
        raise DataUrlError("The data URL holds characters outside ASCII, which are not base64.")
    return DataUrl(media_type.strip().lower(), data)


def padded(data: str) -> str:
    """`DataUrl.data` with the padding that each of its files lacks; no copy where none does.

    Do not call it with more files than the request may hold.
    """
    if "," not in data:
        return data + "=" * (-len(data) % 4) if len(data) % 4 else data
    if all(length % 4 == 0 for length in _lengths(data)):
        return data
    return ",".join(part + "=" * (-len(part) % 4) for part in data.split(","))


def decoded(data: str) -> bytes:
    """The bytes of one file, from `DataUrl.data` without commas; padded or not.

    Raises:
        DataUrlError: it is not base64.
    """
    try:
        return pybase64.b64decode(padded(data), validate=True)
    except ValueError:  # binascii.Error is one
        raise not_base64(data) from None


def not_base64(data: str) -> DataUrlError:
    """Why a decoder refuses `DataUrl.data`, as an error to raise."""
    if wrong := _NOT_BASE64.search(data):
        return DataUrlError(f"The data URL holds {wrong.group()!r}, which is not base64.")
    return DataUrlError("The data URL's base64 is cut off, or padded where it does not end.")


def _lengths(data: str) -> Iterator[int]:
    """Lengths of the parts between commas."""
    start = 0
    while (end := data.find(",", start)) >= 0:
        yield end - start
        start = end + 1
    yield len(data) - start


def _standard(url: str, start: int) -> str:
    """What begins at `start`, in the standard alphabet, without blanks and escapes.

    Searching for a character is some fifty times as fast as replacing it, so that comes first.
    """
    if not any(url.find(character, start) >= 0 for character in "%-_" + _BLANKS):
        return url[start:]
    return "".join(_pieces(url, start))


def _pieces(url: str, start: int) -> Iterator[str]:
    """`_standard` in pieces: cut at each of its escapes, the data would take many times their memory."""
    while start < len(url):
        end = start + _PIECE
        if (escape := url.rfind("%", end - 2, end)) >= 0:
            end = escape + 3
        yield _ESCAPE.sub(_unescaped, url[start:end]).translate(_TO_STANDARD)
        start = end


def _unescaped(escape: re.Match[str]) -> str:
    if (character := _ESCAPABLE.get(escape.group().upper())) is None:
        raise DataUrlError(f"The data URL holds {escape.group()!r}, which is not base64.")
    return character
