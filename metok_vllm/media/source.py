"""Open a video from bytes with PyAV, safely, and list its packets without decoding any."""

from __future__ import annotations

import io
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

from .mp4_guard import check_mp4_claims, looks_like_mp4
from .plan import PacketTable
from .settings import VideoError, VideoSettings

# Containers that libav may try. Playlists (hls, concat, dash), which make it open files and URLs, are left out.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,asf,ivf,gif,apng"
CONTAINER_NAMES = "mp4/mov, webm/mkv, avi, mpeg-ts/ps, flv, ogg, wmv, ivf, gif or animated png"
# Codecs whose key flag means that decoding may start there; others (gif draws on its last frame) are walked through.
_JUMP_CODECS = frozenset(
    ("h264", "hevc", "vvc", "av1", "vp8", "vp9", "mpeg1video", "mpeg2video", "mpeg4", "h263", "flv1", "theora")
    + ("mjpeg", "prores", "dnxhd", "ffv1", "huffyuv", "rawvideo")
    + ("wmv1", "wmv2", "wmv3", "vc1", "msmpeg4v2", "msmpeg4v3")
)
_SEEKABLE = ("mov", "matroska")
_IMAGE_MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}


class Clock:
    """The wall-time limit of one video. Call it often; it raises `VideoError` once the time is up."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def __call__(self) -> None:
        if time.monotonic() > self._end:
            raise VideoError(
                f"Reading the video took longer than {self._timeout_s:g} s (video setting timeout_s)."
            )


@dataclass
class Source:
    """An open container and the video stream in it to read."""

    container: InputContainer
    stream: VideoStream

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """The stream's packets in file order, empty ones left out (to a decoder they would mean the end)."""
        return (packet for packet in self.container.demux(self.stream) if packet.size)


@contextmanager
def open_source(data: bytes, settings: VideoSettings) -> Iterator[Source]:
    """Open `data` and choose its main video stream; raises `VideoError` if there is none that may be read."""
    # libav logs damage to stderr or into Python's logging where another library asked for it; errors are raised here.
    av.logging.set_level(None)
    limits = {"max_pixels": str(settings.max_pixels)}
    try:
        container = av.open(
            io.BytesIO(data),
            mode="r",
            options=limits,
            container_options={
                "format_whitelist": _CONTAINERS,
                "protocol_whitelist": "none",
                "max_streams": "64",
            },
            metadata_errors="replace",
        )
    except (av.FFmpegError, ValueError, OSError, EOFError) as error:
        raise VideoError(_why_not_opened(data)) from error
    try:
        stream = _main_video(container)
        _check_pixels(stream, settings)
        for other in container.streams:
            if other.index != stream.index:
                other.discard = Discard.all
        yield Source(container, stream)
    finally:
        container.close()


def check_bytes(data: bytes) -> None:
    """Refuse what need not be opened: nothing at all, and headers that would make libav allocate without end."""
    if not data:
        raise VideoError("The video is empty (0 bytes).")
    if looks_like_mp4(data):
        check_mp4_claims(data)


def read_packet_table(source: Source, settings: VideoSettings, clock: Clock) -> PacketTable:
    """List every packet of the stream, in time proportional to the file's size; raises `VideoError` over a limit."""
    codec = source.stream.codec_context.codec.canonical_name
    pts, key, shown = array("q"), bytearray(), bytearray()
    timed, damaged = True, False
    try:
        for packet in source.packets():
            if len(pts) % 256 == 0:
                clock()
            if len(pts) >= settings.max_source_frames:
                raise VideoError(
                    f"The video holds more than {settings.max_source_frames} frames"
                    " (video setting max_source_frames)."
                )
            timed = timed and packet.pts is not None
            pts.append(packet.pts or 0)
            key.append(packet.is_keyframe)
            hidden = packet.is_discard or (codec == "vp8" and not memoryview(packet)[0] & 0x10)
            shown.append(not hidden)
    except av.FFmpegError:
        damaged = True
    times = np.array(pts, dtype=np.int64)
    if codec not in _JUMP_CODECS:
        key = bytearray(len(key))
    # An avi file stores no times of display: libav makes them up from the order of decoding.
    timed = timed and len(np.unique(times)) == len(times) and source.container.format.name != "avi"
    return PacketTable(times, np.array(key, dtype=bool), np.array(shown, dtype=bool), timed, damaged)


class SeekMissed(Exception):
    """The container went elsewhere than told; read through it instead."""


class PacketReader:
    """Hands out stretches of packets by their number in the table, skipping what lies between.

    Wide gaps are crossed by seeking in the container where it has a trustworthy index. Where a seek led is read off
    the packet's pts, which the table knows: a container that lies costs time, never a wrong frame.
    """

    SEEK_GAP = 512
    """Seek where at least this many packets are to be skipped; reading past fewer is as quick."""

    def __init__(self, source: Source, table: PacketTable, clock: Clock, *, seek: bool) -> None:
        self.source = source
        self.seeks = 0
        self._table = table
        self._clock = clock
        self._packets = source.packets()
        self._next = 0
        self._seekable = seek and table.timed and source.container.format.name.startswith(_SEEKABLE)
        self._number_of = {int(pts): number for number, pts in enumerate(table.pts)} if self._seekable else {}

    def read(self, start: int, end: int) -> Iterator[Packet[VideoStream] | None]:
        """Packets `start` .. `end` of the table, then None: the end of the stretch, on which a decoder drains."""
        if self._seekable and start - self._next >= self.SEEK_GAP:
            self._seek(start)
        for packet in self._packets:
            number, self._next = self._next, self._next + 1
            if number % 256 == 0:
                self._clock()
            if self._table.timed and packet.pts != self._table.pts[number]:
                raise SeekMissed
            if number >= start:
                yield packet
            if number >= end:
                break
        yield None

    def _seek(self, start: int) -> None:
        self.source.container.seek(int(self._table.pts[start]), stream=self.source.stream, backward=True)
        self.seeks += 1
        packets = self.source.packets()
        first = next(packets, None)
        number = -1 if first is None or first.pts is None else self._number_of.get(first.pts, -1)
        if first is None or not 0 <= number <= start:
            raise SeekMissed
        self._packets, self._next = chain([first], packets), number


def frame_rate(stream: VideoStream, table: PacketTable) -> float:
    """Frames a second: the container's average where it agrees within a factor of two with the packets' times.

    A container may state none, or nonsense. 0.0 where neither tells.
    """
    stated = float(stream.average_rate or stream.guessed_rate or 0)
    measured = 0.0
    if table.timed and table.total > 1 and stream.time_base:
        times = table.pts[table.shown]
        span = (int(times.max()) - int(times.min())) * float(stream.time_base)
        measured = (table.total - 1) / span if span > 0 else 0.0
    if stated > 0 and (measured == 0.0 or 0.5 < stated / measured < 2):
        return stated
    return measured


def _main_video(container: InputContainer) -> VideoStream:
    """The stream that libav thinks best, cover pictures aside."""
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    films = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not films:
        raise VideoError("The file has no video stream, only sound or other data.")
    best = container.streams.best("video")
    stream = next((film for film in films if best is not None and film.index == best.index), films[0])
    if stream.codec_context is None:
        raise VideoError("The video is in a codec that cannot be decoded here.")
    return stream


def _check_pixels(stream: VideoStream, settings: VideoSettings) -> None:
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > settings.max_pixels:
        raise VideoError(
            f"The video's frames of {width} x {height} have more than"
            f" {settings.max_pixels} pixels (video setting max_pixels)."
        )


def _why_not_opened(data: bytes) -> str:
    """One sentence on why libav could not open `data`, from its first bytes."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "animated" if b"ANIM" in data[:64] else "still"
        return f"The data is a WebP picture ({kind}), which is not read as a video; send mp4, webm or gif."
    for magic, name in _IMAGE_MAGIC.items():
        if data.startswith(magic):
            return f"The data is a still image ({name}), not a video."
    if looks_like_mp4(data):
        return "The mp4/mov file is damaged or cut off: its index cannot be read."
    return f"The data is not a video that can be read; send {CONTAINER_NAMES}."
