"""Open a video held in memory with PyAV, safely; list its packets without decoding; hand out some of them."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from mmap import mmap

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

from .mp4_guard import check_mp4, looks_like_mp4
from .recognition import HEAD_BYTES, container_of, usable_length, why_not_opened
from .sampling import PacketTable
from .settings import VideoError, VideoSettings, too_late

# Containers that libav may try. Playlists (hls, dash, concat) make it open files and URLs: they are left out.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,asf,ivf,gif,apng"
# Codecs whose key flag means that decoding may start there. Others (gif paints on its last frame) are walked.
_JUMP_CODECS = {
    *("h264", "hevc", "vvc", "av1", "vp8", "vp9", "mpeg1video", "mpeg2video", "mpeg4", "h263", "theora"),
    *("flv1", "wmv1", "wmv2", "wmv3", "vc1", "msmpeg4v2", "msmpeg4v3"),
    *("mjpeg", "prores", "dnxhd", "ffv1", "huffyuv", "rawvideo"),
}
# Containers whose seeking is a look-up in an index that was read already.
_SEEKABLE = ("mov", "matroska")


class Clock:
    """The wall-time limit of one video. Call it often; it raises `VideoError` once the time is up."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """A time that does not count."""
        start = time.monotonic()
        yield
        self._end += time.monotonic() - start

    def __call__(self) -> None:
        if time.monotonic() > self._end:
            raise VideoError(too_late(self._timeout_s))


class SeekMissed(Exception):
    """The container went elsewhere than told; read through it instead."""


@dataclass(frozen=True)
class VideoFile:
    """The bytes of a video file that passed the first checks, and how libav is to open them."""

    data: bytes | mmap
    length: int
    """Bytes of `data` that libav is to see."""
    edit_lists: bool

    @classmethod
    def check(cls, data: bytes | mmap) -> VideoFile:
        """Refuse, with `VideoError`, what need not be opened: no data, and headers made to exhaust memory."""
        if not data:
            raise VideoError("The video is empty (0 bytes).")
        return cls(data, usable_length(data), edit_lists=not looks_like_mp4(data) or check_mp4(data))


class _Reader:
    """A file for libav to read, without a copy of the whole."""

    def __init__(self, file: VideoFile) -> None:
        self._data = memoryview(file.data)[: file.length]
        self._at = 0

    def read(self, size: int) -> bytes:
        piece = bytes(self._data[self._at : self._at + size])
        self._at += len(piece)
        return piece

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._data)}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        return self._at


@dataclass
class Source:
    """An open container and the video stream in it to read."""

    container: InputContainer
    stream: VideoStream

    @property
    def codec(self) -> str:
        """The codec's name, whichever decoder serves it."""
        return self.stream.codec_context.codec.canonical_name

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """The stream's packets in file order, without empty ones: to a decoder they would mean the end."""
        ended = False
        while not ended:
            # PyAV has no object for a stream that comes up later (flv, mpeg): IndexError. The packet has been
            # read past; the next call goes on behind it.
            with suppress(IndexError):
                yield from (packet for packet in self.container.demux(self.stream) if packet.size)
                ended = True


@contextmanager
def open_source(file: VideoFile, settings: VideoSettings) -> Iterator[Source]:
    """Open `file` and choose its main video stream; raises `VideoError` if there is none that may be read."""
    # Where another library switched libav's log on, damage would fill it; here it becomes one error.
    av.logging.set_level(None)
    stated = container_of(file.data[:HEAD_BYTES])
    try:
        container = av.open(
            _Reader(file),
            mode="r",
            format=stated,
            options={"max_pixels": str(settings.max_pixels)},
            container_options={
                "format_whitelist": stated or _CONTAINERS,
                "protocol_whitelist": "none",
                "max_streams": "64",
                "advanced_editlist": str(int(file.edit_lists)),
            },
            metadata_errors="replace",
        )
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError, OSError, EOFError) as error:
        raise VideoError(why_not_opened(file.data[:HEAD_BYTES])) from error
    try:
        stream = _main_video(container)
        for other in container.streams:
            if other.index != stream.index:
                other.discard = Discard.all
        yield Source(container, stream)
    finally:
        container.close()


def read_packet_table(source: Source, settings: VideoSettings, clock: Clock) -> PacketTable:
    """List every packet of the stream, in time proportional to the file's size.

    Raises `VideoError` if they are more than `max_source_frames`, or when the time is up.
    """
    pts, key, shown = array("q"), bytearray(), bytearray()
    timed, damaged, cut_off = True, False, False
    jump, vp8 = source.codec in _JUMP_CODECS, source.codec == "vp8"
    try:
        for packet in source.packets():
            if len(pts) % 256 == 0:
                clock()
            if len(pts) >= settings.max_source_frames:
                raise VideoError(
                    f"The video holds more than {settings.max_source_frames} frames (video setting max_source_frames)."
                )
            timed = timed and packet.pts is not None
            pts.append(packet.pts or 0)
            key.append(jump and packet.is_keyframe)
            # Bit 4 of a vp8 packet says if it is for display; no other codec here has packets that are not.
            shown.append(not packet.is_discard and not (vp8 and not memoryview(packet)[0] & 0x10))
            cut_off = packet.is_corrupt
    except MemoryError:
        raise
    except av.FFmpegError:
        damaged = True
    if cut_off:  # the file ends within its last packet
        shown[-1] = False
    times = np.array(pts, dtype=np.int64)
    # An avi file stores no times of display: libav makes them up from the order of decoding.
    timed = timed and len(np.unique(times)) == len(times) and source.container.format.name != "avi"
    return PacketTable(times, np.array(key, dtype=bool), np.array(shown, dtype=bool), timed, damaged)


class PacketReader:
    """Hands out stretches of packets by their number in the table, passing over what lies between.

    Wide gaps are crossed by seeking where the container has an index. Where a seek led to is read off the
    packets' pts, which the table knows: a container that lies costs time, never a wrong frame.
    """

    SEEK_GAP = 512
    """Seek where at least this many packets are to be passed over; reading past fewer is as quick."""

    def __init__(self, source: Source, table: PacketTable, clock: Clock, *, seek: bool) -> None:
        self.source = source
        self._table = table
        self._clock = clock
        self._packets = source.packets()
        self._next = 0
        self._may_seek = seek and table.timed and source.container.format.name.startswith(_SEEKABLE)
        self._sought = False

    def read(self, start: int, end: int) -> Iterator[Packet[VideoStream] | None]:
        """Packets `start` .. `end` of the table, then None: the stretch's end, on which a decoder drains."""
        if self._may_seek and start - self._next >= self.SEEK_GAP:
            self._seek(start)
        try:
            for packet in self._packets:
                number, self._next = self._next, self._next + 1
                if number % 256 == 0:
                    self._clock()
                if self._sought and packet.pts != self._table.pts[number]:
                    raise SeekMissed
                if number >= start:
                    yield packet
                if number >= end:
                    break
        except MemoryError:
            raise
        except av.FFmpegError:
            pass  # the data ends here, as it did when the table was made
        yield None

    def _seek(self, start: int) -> None:
        """Seek to packet `start` or to one before it; raises `SeekMissed` if the container went elsewhere."""
        try:
            self.source.container.seek(int(self._table.pts[start]), stream=self.source.stream)
            packets = self.source.packets()
            first = next(packets, None)
        except MemoryError:
            raise
        except av.FFmpegError as error:
            raise SeekMissed from error
        if first is None or first.pts is None:
            raise SeekMissed
        found = np.flatnonzero(self._table.pts == first.pts)
        if len(found) != 1 or found[0] > start:
            raise SeekMissed
        self._packets, self._next, self._sought = chain([first], packets), int(found[0]), True


def working_memory(stream: VideoStream, threads: int) -> int:
    """Bytes that decoding the stream takes beside the frames that are kept; an upper estimate.

    A codec refers to up to 16 frames, and each thread holds one or two more. Two are on their way to RGB.
    """
    context = stream.codec_context
    pixels = context.width * context.height
    bits = context.format.padded_bits_per_pixel if context.format is not None else 24
    return (64 << 20) + (20 + 2 * threads) * pixels * bits // 8 + 2 * 3 * pixels


def frame_rate(stream: VideoStream, table: PacketTable) -> float:
    """Frames a second, on average; 0.0 where neither the container nor the packets' times tell.

    The container's figure counts where it agrees with the times within a factor of two: some state nonsense.
    """
    stated = float(stream.average_rate or stream.guessed_rate or 0)
    measured = 0.0
    if table.timed and table.total > 1 and stream.time_base:
        times = table.pts[table.shown]
        span = (int(times.max()) - int(times.min())) * float(stream.time_base)
        measured = (table.total - 1) / span
    return stated if stated > 0 and (measured == 0.0 or 0.5 < stated / measured < 2) else measured


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
