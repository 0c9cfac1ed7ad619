"""The grammar of data URLs: what clients write is read, what is not base64 gets a sentence."""

from __future__ import annotations

import base64
import binascii
import contextlib
import time
import tracemalloc
import urllib.parse

import pytest

from metok_vllm.media.data_urls import DataUrlError, decoded, padded, read_data_url

RAW = bytes(range(256)) * 3 + b"\xfb\xff\xfe"  # gives "+" and "/"
PLAIN = base64.b64encode(RAW).decode()
LINES = "\n".join(PLAIN[i : i + 76] for i in range(0, len(PLAIN), 76))


def test_the_sample_has_what_the_variants_vary() -> None:
    assert "+" in PLAIN
    assert "/" in PLAIN
    assert len(RAW) % 3 == 0
    assert LINES.count("\n") > 5


HEADERS = {
    "data:video/mp4;base64,": "video/mp4",
    "DATA:VIDEO/MP4;BASE64,": "video/mp4",
    "data:;base64,": "",
    "data:base64,": "",
    "data:video/mp4;codecs=avc1;base64,": "video/mp4",
    "data:video/webm;codecs=vp8,opus;base64,": "video/webm",
    'data:video/mp4;codecs="avc1.42E01E, mp4a.40.2";base64,': "video/mp4",
    'data:video/mp4;name="a;base64,b.mp4";base64,': "video/mp4",
    'data:video/mp4;name="open;base64,': "video/mp4",
    "data:video/mp4;name=a%2Cb.mp4;charset=utf-8;base64,": "video/mp4",
    "data: video/mp4 ; codecs=avc1 ; base64 , ": "video/mp4",
    "data:video/mp4;\n base64,\n": "video/mp4",
    "data:video/x-matroska;codecs=avc1,opus;base64,": "video/x-matroska",
    "data:video/mp4;base64=no;base64,": "video/mp4",
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers(header: str) -> None:
    media_type, data = read_data_url(header + PLAIN)
    assert media_type == HEADERS[header]
    assert data == PLAIN


BODIES = {
    "wrapped at 76": LINES,
    "wrapped, carriage returns": LINES.replace("\n", "\r\n"),
    "a newline at the end": PLAIN + "\n",
    "blanks all over": " \t" + " ".join(PLAIN) + "\f\v",
    "alphabet for URLs": base64.urlsafe_b64encode(RAW).decode(),
    "percent-encoded": urllib.parse.quote(PLAIN, safe=""),
    "percent-encoded, small letters": urllib.parse.quote(PLAIN, safe="").replace("%2B", "%2b").replace("%2F", "%2f"),
    "percent-encoded lines": urllib.parse.quote(LINES.replace("\n", "\r\n"), safe=""),
    "percent-encoded throughout": "".join(f"%{ord(character):02X}" for character in PLAIN),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies(name: str) -> None:
    assert read_data_url("data:video/mp4;base64," + BODIES[name]).data == PLAIN
    assert decoded(read_data_url("data:video/mp4;base64," + BODIES[name]).data) == RAW


@pytest.mark.parametrize("before", range(4))
def test_an_escape_across_two_pieces(before: int) -> None:
    """Long data are read in pieces of 64 Ki characters."""
    text = "A" * ((1 << 16) - before) + "%2B%2F" + "A" * (1 << 16) + "%2Fab="
    assert read_data_url("data:;base64," + text).data == urllib.parse.unquote(text)


@pytest.mark.parametrize("length", range(9))
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_padding_may_be_missing_in_part_or_whole(length: int, encode: object) -> None:
    raw = b"\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8"[:length]
    full = encode(raw).decode()  # type: ignore[operator]
    for missing in range(full.count("=") + 1):
        data = read_data_url("data:,;base64," + full[: len(full) - missing]).data
        assert decoded(data) == raw
        assert base64.b64decode(padded(data), validate=True) == raw


def test_a_list_of_files_is_padded_one_by_one() -> None:
    whole = ",".join(base64.b64encode(b"abcdef"[:n]).decode() for n in (3, 4, 5, 6))
    assert padded(whole) is whole
    assert padded(whole.replace("=", "")) == whole
    written = urllib.parse.quote(whole.replace(",", ",\n"), safe="")
    assert read_data_url("data:video/jpeg;base64," + written).data == whole
    assert padded("") == ""
    assert padded(",,") == ",,"


WRONG_URLS = {
    "data:video/mp4,abc": "does not state base64",
    "data:video/mp4;base64": "does not state base64",
    "data:": "does not state base64",
    "data:video/mp4;base32,AAAA": "does not state base64",
    'data:video/mp4;name=";base64,AAAA"': "does not state base64",
    "data:;x=" + "y" * 5000 + ";base64,AAAA": "does not state base64",
    "data:;base64,AA\u00e9A": "outside ASCII",
    "data:;base64,AA\ud800A": "outside ASCII",
    "data:;base64,AA%": "holds '%'",
    "data:;base64,AA%%32B": "holds '%%3'",
    "data:;base64,AA%2": "holds '%2'",
    "data:;base64,AA%00AA": "holds '%00'",
    "data:;base64,AA%25%32B": "holds '%25'",
}


@pytest.mark.parametrize("url", WRONG_URLS, ids=range(len(WRONG_URLS)))
def test_what_is_no_data_url_in_base64(url: str) -> None:
    with pytest.raises(DataUrlError, match=WRONG_URLS[url]) as raised:
        read_data_url(url)
    assert str(raised.value).count(". ") == 0
    assert len(str(raised.value)) < 120


WRONG_DATA = {
    "A": "cut off",
    "AAAAA": "cut off",
    "QQ==QQ==": "padded where it does not end",
    "QQQ==": "padded",
    "=": "padded",
    "AA!A": "holds '!'",
    "AAAA#t=10": "holds '#'",
    "<html>": "holds '<'",
    "AA\x00A": r"holds '\\x00'",
}


@pytest.mark.parametrize("data", WRONG_DATA)
def test_what_is_not_base64(data: str) -> None:
    with pytest.raises(DataUrlError, match=WRONG_DATA[data]):
        decoded(read_data_url("data:;base64," + data).data)
    with pytest.raises(binascii.Error):
        base64.b64decode(padded(data), validate=True)


MIB = 1 << 20


def hostile(size: int) -> dict[str, str]:
    """URLs of about `size` characters, of the kinds that cost other readers most."""
    return {
        "lines of one": "data:;base64," + "A\n" * (size // 2),
        "escapes": "data:;base64," + "%41" * (size // 3),
        "every escape": "data:;base64," + "".join(f"%{ord(c):02x}" for c in PLAIN) * (size // 3 // len(PLAIN)),
        "wrong escapes": "data:;base64," + "%00" * (size // 3),
        "only quotes": "data:" + '"' * size,
        "only semicolons": "data:" + "; " * (size // 2),
        "blanks": "data:;" + " " * size + "base64,",
        "no padding": "data:;base64," + "AA," * (size // 3),
    }


@pytest.mark.parametrize("name", hostile(3))
def test_time_is_linear(name: str) -> None:
    def seconds(url: str) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            with contextlib.suppress(DataUrlError):
                padded(read_data_url(url).data)
            best = min(best, time.perf_counter() - start)
        return best

    small, large = (seconds(hostile(size)[name]) for size in (MIB // 8, MIB))
    assert large < 8 * 4 * small + 0.05
    assert large < 1


@pytest.mark.parametrize(
    ("url", "copies"),
    [
        ("data:;base64," + "AAAA" * MIB, 1),
        ("data:;base64," + ("A" * 76 + "\n") * (4 * MIB // 77), 2),
        ("data:;base64," + "AA-_" * MIB, 2),
        ("data:;base64," + ("A" * 61 + "%2B") * (MIB // 16), 2),
    ],
    ids=["plain", "lines", "alphabet for URLs", "escapes"],
)
def test_memory_is_one_copy_and_one_more_where_something_is_replaced(url: str, copies: int) -> None:
    tracemalloc.start()
    try:
        padded(read_data_url(url).data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (copies + 0.1) * len(url)
    assert peak > 0.9 * len(url)
