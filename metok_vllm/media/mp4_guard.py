"""Look at an mp4/mov file's headers before libav believes them.

libav builds its index of samples when it opens a file, at 24 bytes and more a sample, from counts that the
file merely states. Three boxes state counts without a table behind them: a constant-size ``stsz``, a ``trun``
without per-sample fields, and an ``elst`` whose edits repeat the whole track. A file of 5 KB can so take
gigabytes and many seconds inside one call that nothing can interrupt. The boxes are searched by name wherever
they lie outside ``mdat``, because libav accepts them in odd places too.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

from .settings import VideoError

MAX_INDEX_ENTRIES = 4_000_000
"""Samples that all headers of a file together may claim; libav's index of them takes about 150 MB."""
_FEW_EDITS = 64
# libav itself refuses counts from about 2**27 on. What looks like such a count is often a word in the file's
# metadata ("trunk"): not a reason to refuse a good file.
_LIBAV_REFUSES = 2**28
_MAX_TOP_BOXES = 2_000_000
_FIRST_BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof", b"sidx", b"pnot"}
_NOT_HEADERS = {b"mdat", b"free", b"skip", b"wide"}


def looks_like_mp4(data: bytes) -> bool:
    """Whether the first box of `data` is one with which mp4 and mov files begin."""
    return data[4:8] in _FIRST_BOXES


def check_mp4(data: bytes) -> bool:
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


def _header_spans(data: bytes) -> Iterator[tuple[int, int]]:
    """Byte ranges of `data`'s top-level boxes, without those that hold media or padding."""
    at, boxes = 0, 0
    while at + 8 <= len(data):
        boxes += 1
        if boxes > _MAX_TOP_BOXES:
            raise VideoError("The mp4/mov file is cut into too many boxes.")
        size, name = struct.unpack_from(">I4s", data, at)
        if size == 1 and at + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, at + 8)
        end = len(data) if size == 0 else min(len(data), at + max(size, 8))
        if name not in _NOT_HEADERS:
            yield at, end
        at = end


def _track_spans(data: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The ranges from one ``trak`` to the next; what precedes the first is a range too."""
    starts = [start, *(match.start() for match in re.compile(b"trak").finditer(data, start, end))]
    yield from zip(starts, [*starts[1:], end], strict=True)


def _sample_counts(data: bytes, start: int, end: int) -> tuple[int, int]:
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


def _is_pcm_audio(data: bytes, start: int, end: int) -> bool:
    """Whether the track is sound whose samples last one tick: libav indexes its chunks, not its samples."""
    handlers = {handler for (handler,) in _fields(data, b"hdlr", start, end, 8, "4s")}
    times = list(_fields(data, b"stts", start, end, 4, ">III"))
    one_tick = all(entries == 1 and ticks == 1 for entries, _, ticks in times)
    return b"soun" in handlers and b"vide" not in handlers and bool(times) and one_tick


def _fields(data: bytes, name: bytes, start: int, end: int, skip: int, layout: str) -> Iterator[tuple[Any, ...]]:
    """Unpack `layout`, `skip` bytes after every occurrence of the box type `name` in ``data[start:end]``."""
    size = struct.calcsize(layout)
    for match in re.compile(re.escape(name)).finditer(data, start, end):
        at = match.end() + skip
        if at + size <= end:
            yield struct.unpack_from(layout, data, at)
