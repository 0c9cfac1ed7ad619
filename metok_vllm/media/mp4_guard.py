"""A cheap first look at an mp4/mov file's headers, before libav believes them.

Nothing rests on it: memory and time are bounded by the limits of the process that decodes. It refuses the
commonest attacks at once, with a sentence that says why, and it tells libav which edit lists to leave alone.

libav builds its index of samples when it opens a file, at 24 bytes and more a sample, from counts that the
file merely states. Three boxes state counts without a table behind them: a constant-size ``stsz``, a ``trun``
without per-sample fields, and an ``elst`` whose edits repeat the whole track. A file of 5 KB can so take
gigabytes and many seconds inside one call. The boxes are searched by name wherever they lie outside media and
padding, because libav accepts them in odd places too (its `mov_read_default` in libavformat/mov.c). The time
it takes is linear in the bytes outside media and padding, and in the number of top-level boxes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import islice, takewhile
from mmap import mmap
from typing import Any

from .settings import VideoError

MAX_INDEX_ENTRIES = 4_000_000
"""Samples that all headers of a file together may claim; libav's index of them takes about 150 MB."""
_FEW_EDITS = 64
# libav itself refuses counts from about 2**27 on. What looks like such a count is often a word in the file's
# metadata ("trunk"): not a reason to refuse a good file.
_LIBAV_REFUSES = 2**28
_MAX_TOP_BOXES = 500_000
_MOST_TRACKS = 1000
# libav looks at so much of a file to tell what it is, and passes over boxes that it does not know.
_PROBED = 1 << 20
_KNOWN_BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof", b"sidx", b"pnot"} | {
    *(b"udta", b"uuid", b"junk", b"pict", b"prfl", b"hoov", b"ediw", b"jP  ", b"\x82\x82\x7f\x7d")
}
_NOT_HEADERS = {b"mdat", b"free", b"skip", b"wide"}
_MOVIE_STARTS = {b"mvhd", b"cmov"}


def looks_like_mp4(data: bytes | mmap) -> bool:
    """Whether libav would take `data` for an mp4 or mov file, as far as its first boxes tell.

    The first bytes of a file are enough where its first box is of a known kind.
    """
    probed = takewhile(lambda box: box[1] < _PROBED, _boxes(data))
    return any(name in _KNOWN_BOXES for name, _, _ in probed)


def check_mp4(data: bytes | mmap) -> bool:
    """Raise `VideoError` if the headers of the mp4/mov file `data` claim far more samples than is sane.

    Returns whether its edit lists are short enough for libav to expand; else it must be told to ignore them.
    """
    tabled = claimed = edits = 0
    for start, end in _header_spans(data):
        if data.find(b"cmov", start, end) >= 0:
            raise VideoError("The mov file has a compressed header, which is not supported.")
        for track_start, track_end in _track_spans(data, start, end):
            in_table, merely_claimed = _sample_counts(data, track_start, track_end)
            tabled += in_table
            claimed += merely_claimed
        for (count,) in _fields(data, b"elst", start, end, 4, ">I"):
            edits += min(count, (end - start) // 12)
        claimed += sum(n for (n,) in _fields(data, b"trun", start, end, 4, ">I") if n < _LIBAV_REFUSES)
    if claimed > MAX_INDEX_ENTRIES:
        raise VideoError("The mp4/mov file is damaged: its header claims far more frames than it can hold.")
    return edits <= _FEW_EDITS or edits * (tabled + claimed) <= MAX_INDEX_ENTRIES


def _boxes(data: bytes | mmap) -> Iterator[tuple[bytes, int, int]]:
    """Name, first byte and end of each top-level box, behind the ID3 tag that libav passes over.

    A last box that is cut off, or says that it goes on to the end of the file, ends where `data` ends.
    """
    at = _id3_size(data)
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if size == 1 and at + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, at + 8)
        end = len(data) if size == 0 else min(len(data), at + max(size, 8))
        yield name, at, end
        at = end


def _id3_size(data: bytes | mmap) -> int:
    """Bytes of the ID3 tag at the start of `data`: its header, and a size of four times seven bits."""
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    first, second, third, last = data[6:10]
    return 10 + ((first & 127) << 21 | (second & 127) << 14 | (third & 127) << 7 | last & 127)


def _header_spans(data: bytes | mmap) -> Iterator[tuple[int, int]]:
    """Byte ranges of `data`'s top-level boxes, without those that hold media or padding."""
    for number, (name, start, end) in enumerate(_boxes(data)):
        if number >= _MAX_TOP_BOXES:
            raise VideoError("The mp4/mov file is cut into too many boxes.")
        # Padding in which libav finds the start of a movie's index, where it finds no index elsewhere.
        if name not in _NOT_HEADERS or (name == b"free" and data[start + 12 : start + 16] in _MOVIE_STARTS):
            yield start, end


def _track_spans(data: bytes | mmap, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The ranges from one ``trak`` to the next; what precedes the first is a range too.

    Beyond `_MOST_TRACKS` the rest is one range: libav is told to read 64 streams.
    """
    starts = [start, *islice(_places(data, b"trak", start, end), _MOST_TRACKS)]
    yield from zip(starts, [*starts[1:], end], strict=True)


def _sample_counts(data: bytes | mmap, start: int, end: int) -> tuple[int, int]:
    """Samples of one track that a table lists, and samples that are merely claimed."""
    tabled = claimed = 0
    for size, count in _fields(data, b"stsz", start, end, 4, ">II"):
        if size == 0:
            tabled += min(count, (end - start) // 4)
        elif count < _LIBAV_REFUSES and not (_is_pcm_audio(data, start, end) and count <= len(data)):
            claimed += count
    for _, count in _fields(data, b"stz2", start, end, 4, ">II"):
        tabled += min(count, (end - start) * 2)
    return tabled, claimed


def _is_pcm_audio(data: bytes | mmap, start: int, end: int) -> bool:
    """Whether the track is sound whose samples last one tick: libav indexes its chunks, not its samples."""
    handlers = {handler for (handler,) in _fields(data, b"hdlr", start, end, 8, "4s")}
    times = list(_fields(data, b"stts", start, end, 4, ">III"))
    one_tick = all(entries == 1 and ticks == 1 for entries, _, ticks in times)
    return b"soun" in handlers and b"vide" not in handlers and bool(times) and one_tick


def _fields(data: bytes | mmap, name: bytes, start: int, end: int, skip: int, layout: str) -> Iterator[tuple[Any, ...]]:
    """Unpack `layout`, `skip` bytes after every occurrence of the box type `name` in ``data[start:end]``."""
    size = struct.calcsize(layout)
    for place in _places(data, name, start, end):
        at = place + len(name) + skip
        if at + size <= end:
            yield struct.unpack_from(layout, data, at)


def _places(data: bytes | mmap, name: bytes, start: int, end: int) -> Iterator[int]:
    """Where `name` begins in ``data[start:end]``."""
    at = data.find(name, start, end)
    while at >= 0:
        yield at
        at = data.find(name, at + len(name), end)
