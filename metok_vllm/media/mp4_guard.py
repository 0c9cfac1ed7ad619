"""Refuse mp4/mov files whose headers claim far more samples than they hold, before libav believes them.

libav builds its sample index when it opens a file, 24 bytes and more a sample, from counts that the file merely states.
Three boxes state a count without a table behind it: a constant-size ``stsz``, a ``trun`` without per-sample fields, and
an ``elst`` whose edits repeat the whole track. A file of 5 KB can so take gigabytes and many seconds inside one call
that nothing can interrupt. The boxes are found by name wherever they lie outside ``mdat``, because libav too accepts
them in odd places.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

from .settings import VideoError

MAX_INDEX_ENTRIES = 4_000_000
"""Samples that all headers of a file together may claim (about 150 MB of libav's index)."""
_FEW_EDITS = 64
_MAX_TOP_BOXES = 2_000_000
_MP4_FIRST_BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof", b"sidx", b"pnot"}


def looks_like_mp4(data: bytes) -> bool:
    """Whether the first box of `data` is one with which mp4 and mov files begin."""
    return data[4:8] in _MP4_FIRST_BOXES


def check_mp4_claims(data: bytes) -> None:
    """Raise `VideoError` if the headers of the mp4/mov file `data` claim more samples than is sane."""
    in_tables, claimed, edits = 0, 0, 0
    for start, end in _header_spans(data):
        if data.find(b"cmov", start, end) >= 0:
            raise VideoError("The mov file has a compressed header, which is not supported.")
        for track_start, track_end in _track_spans(data, start, end):
            tabled, constant = _sample_counts(data, track_start, track_end)
            in_tables += tabled
            claimed += constant
            edits += sum(count for count, in _fields(data, b"elst", track_start, track_end, 4, ">I"))
        claimed += sum(count for count, in _fields(data, b"trun", start, end, 4, ">I"))
    repeated = edits * (in_tables + claimed) if edits > _FEW_EDITS else 0
    if max(claimed, repeated) > MAX_INDEX_ENTRIES:
        raise VideoError("The mp4/mov file is damaged: its header claims far more frames than it can hold.")


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
        if name not in (b"mdat", b"free", b"skip", b"wide"):
            yield at, end
        at = end


def _track_spans(data: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The ranges between one ``trak`` and the next; what precedes the first is a range too."""
    starts = [start] + [match.start() for match in re.compile(b"trak").finditer(data, start, end)]
    yield from zip(starts, [*starts[1:], end], strict=True)


def _sample_counts(data: bytes, start: int, end: int) -> tuple[int, int]:
    """Samples of one track that a table lists, and samples that are merely claimed."""
    tabled = claimed = 0
    for size, count in _fields(data, b"stsz", start, end, 4, ">II"):
        if size == 0:
            tabled += min(count, (end - start) // 4)
        elif not _is_pcm_audio(data, start, end) or count > len(data):
            claimed += count
    for field_size, count in _fields(data, b"stz2", start, end, 4, ">II"):
        tabled += min(count, (end - start) * 8 // max(field_size & 0xFF, 4))
    return tabled, claimed


def _is_pcm_audio(data: bytes, start: int, end: int) -> bool:
    """Whether the track is sound whose every sample lasts one tick: libav then indexes its chunks, not its samples."""
    handlers = {handler for handler, in _fields(data, b"hdlr", start, end, 8, "4s")}
    times = list(_fields(data, b"stts", start, end, 4, ">III"))
    return (
        b"soun" in handlers
        and b"vide" not in handlers
        and bool(times)
        and all(entries == 1 and ticks == 1 for entries, _, ticks in times)
    )


def _fields(
    data: bytes, name: bytes, start: int, end: int, skip: int, layout: str
) -> Iterator[tuple[Any, ...]]:
    """Unpack `layout` `skip` bytes after every occurrence of the box type `name` between `start` and `end`."""
    size = struct.calcsize(layout)
    for match in re.compile(re.escape(name)).finditer(data, start, end):
        at = match.end() + skip
        if at + size <= len(data):
            yield struct.unpack_from(layout, data, at)
