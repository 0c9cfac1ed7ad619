"""What data are, from their first bytes: raw streams, which libav is told of; what is no video, and why.

Nothing here decodes or believes a count. What does not show at the start is not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from mmap import mmap

from .mp4_guard import looks_like_mp4

CONTAINER_NAMES = "mp4/mov, webm/mkv, avi, mpeg-ts/ps, flv, ogg, wmv, ivf, gif or animated png"
HEAD_BYTES = 4096
"""As many first bytes are enough for all functions here but `usable_length`."""

_MAGIC = {
    b"\xff\xd8\xff": "a still image (JPEG), not a video",
    b"\x89PNG\r\n\x1a\n": "a still image (PNG), not a video",
    b"BM": "a still image (BMP), not a video",
    b"II*\0": "a still image (TIFF), not a video",
    b"MM\0*": "a still image (TIFF), not a video",
    b"GIF8": "a gif that is damaged or cut off",
    b"\x1a\x45\xdf\xa3": "not a video that can be read, but a webm/mkv file that is damaged or cut off",
    b"OggS": "an ogg file that is damaged or cut off, or holds no video",
    b"FLV": "a flv file that is damaged or cut off",
    b"\x1f\x43\xb6\x75": "a segment of a webm/mkv stream without the header before it; join the two",
    b"YUV4MPEG2": "raw pictures (y4m); encode them, for example as mp4",
    b"ID3": "sound (MP3), not a video",
    b"fLaC": "sound (FLAC), not a video",
    b"%PDF": "a PDF document, not a video",
    b"PK\x03\x04": "a zip archive; send the video in it",
    b"\x1f\x8b": "a gzip archive; send the video in it",
    b"BZh": "a bzip2 archive; send the video in it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; send the video in it",
    b"Rar!": "a rar archive; send the video in it",
}
_RIFF = {b"WAVE": "sound (WAV), not a video", b"AVI ": "an avi file that is damaged or cut off"}
_PLAYLIST = "a playlist ({}), not a video: it only names one; send the video itself"
# What text begins with, blanks and letter case aside; a playlist in XML may say so a little later.
_TEXT = {
    b"#extm3u": _PLAYLIST.format("HLS"),
    b"[playlist]": _PLAYLIST.format("PLS"),
    b"ffconcat": _PLAYLIST.format("concat"),
    b"<mpd": _PLAYLIST.format("DASH"),
    b"<smoothstreamingmedia": _PLAYLIST.format("Smooth Streaming"),
    b"<smil": _PLAYLIST.format("SMIL"),
    b"<asx": _PLAYLIST.format("ASX"),
    b"v=0": "a description of a stream (SDP), not the stream",
    b"http://": "the address of something, not the thing itself",
    b"https://": "the address of something, not the thing itself",
    b"data:": "a data URL inside of another one; send it as it is",
    b"<!doctype": "a web page, not a video",
    b"<html": "a web page, not a video",
    b"<?xml": "an XML document, not a video",
    b"{": "JSON, not a video",
}
_STILL_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif"}
_VIDEO_OBJECT_LAYERS = [bytes([code]) for code in range(0x20, 0x30)]
# First bytes of the units with which a stream may begin: delimiter, supplement, parameters.
_H264_STARTS = (0x09, 0x06, 0x27, 0x47, 0x67)
_HEVC_STARTS = (0x46, 0x4E, 0x40, 0x42)
_TS_SEEN = 10 * 188
_MAX_BOXES = 2_000_000  # as `mp4_guard`, which then refuses the file
_SEGMENT = "a media segment without its initialisation segment; send the two as one file, that one first"


def container_of(head: bytes) -> str | None:
    """The name that libav has for a stream that begins as these do, or None where libav is to find out.

    They are streams without a container (h264, hevc, AV1, MPEG-4, MPEG-1 and 2), and transport streams. libav
    knows both by what they hold all through, so that it takes a short transport stream for a raw one or for
    nothing. These readers read the stream itself and open nothing else.

    Args:
        head: the first `HEAD_BYTES` of the data.
    """
    if head.startswith(b"\x12\0\x0a"):  # a temporal delimiter, then a sequence header
        return "obu"
    if looks_like_mp4(head):  # a first box with a long size begins as a start code does
        return None
    if len(head) >= 3 * 188 and set(head[:_TS_SEEN:188]) == {0x47} and not head.startswith(b"GIF8"):
        return "mpegts"
    zeros = len(head) - len(head.lstrip(b"\0"))
    if zeros < 2 or head[zeros : zeros + 1] != b"\1":
        return None
    start = head[zeros + 1 :]
    if len(start) < 2:
        return None
    first, second = start[0], start[1]
    if first == 0xB3:
        return "mpegvideo"  # MPEG-1 and 2
    if first == 0xB0 or (first < 0x20 and start[1:4] == b"\0\0\1" and start[4:5] in _VIDEO_OBJECT_LAYERS):
        return "m4v"
    if first in _HEVC_STARTS and second & 0xF8 == 0 and second & 7:
        return "hevc"
    return "h264" if first in _H264_STARTS else None


def why_not_opened(head: bytes) -> str:
    """One sentence on what the data are that libav could not open.

    Args:
        head: the first `HEAD_BYTES` of the data; more does not hurt.
    """
    what = _what(head)
    if what is not None:
        return f"The data is {what}."
    return f"The data is not a video that can be read; send {CONTAINER_NAMES}."


def _what(head: bytes) -> str | None:
    if head[:4] == b"RIFF":
        if head[8:12] == b"WEBP":
            kind = "animated" if b"ANIM" in head[:64] else "still"
            return f"a WebP picture ({kind}), which is not read as a video; send mp4, webm or gif"
        return _RIFF.get(head[8:12])
    if looks_like_mp4(head):
        return _what_mp4(head)
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    if (stream := container_of(head)) is not None:
        return f"{'an mpeg-ts' if stream == 'mpegts' else f'a raw {stream}'} stream that is damaged or cut off"
    text = head[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<?xml"):
        for word, name in _TEXT.items():
            if word.startswith(b"<") and word != b"<?xml" and word in text:
                return name
    return next((name for word, name in _TEXT.items() if text.startswith(word)), None)


def _what_mp4(head: bytes) -> str:
    names = [name for name, _, _ in _boxes(head)]
    if names[0] == b"ftyp" and head[8:12] in _STILL_BRANDS:
        return "a still image (HEIF or AVIF), not a video"
    if b"moof" in names and b"moov" not in names:
        return _SEGMENT
    if names[0] in (b"styp", b"sidx") and b"moov" not in names:
        return _SEGMENT
    return (
        "an mp4/mov file that is damaged or cut off: its index cannot be read, and is written last while a camera "
        "still records"
    )


def usable_length(data: bytes | mmap) -> int:
    """How much of `data` libav can open: all of it, but for the half box at the end of a live mp4 stream.

    A recording in fragments may be cut anywhere. A half `mdat` is frames, of which the whole ones are read; a
    half header in front of the next ones makes libav refuse the file.

    Args:
        data: the whole file, of any kind.
    """
    if not looks_like_mp4(data):
        return len(data)
    fragmented = False
    for name, start, end in _boxes(data):
        if end > len(data) and fragmented and name != b"mdat":
            return start
        fragmented = fragmented or name == b"moof"
    return len(data)


def _boxes(data: bytes | mmap) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and stated end of each top-level box that begins in `data`; a last one may be a rest."""
    at = 0
    for _ in range(_MAX_BOXES):
        if at >= len(data):
            return
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1 and at + 16 <= len(data):
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        rest = len(data) - at
        end = len(data) if size == 0 and rest >= 8 else at + max(size, 8)
        yield data[at + 4 : at + 8], at, end
        at = end
