"""Small videos made on the spot: every frame carries its number as 16 black or white bars."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache

import av
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
BITS = 16


def numbered(number: int, width: int = 64, height: int = 48) -> Image:
    """[height, width, 3] RGB picture that shows `number` < 2**16 in bars, lowest bit at the left."""
    bits = (number >> (np.arange(width) * BITS // width)) & 1
    return np.broadcast_to((bits * 255).astype(np.uint8)[None, :, None], (height, width, 3)).copy()


def number_of(image: Image) -> int:
    """The number that a (lossily coded) `numbered` picture shows."""
    height, width, _ = image.shape
    centres = (np.arange(BITS) * 2 + 1) * width // (2 * BITS)
    bars = image[height // 4 : 3 * height // 4, centres].astype(int).mean(axis=(0, 2))
    return int(((bars > 127) << np.arange(BITS)).sum())


def encode(
    images: Iterable[Image],
    *,
    codec: str = "libx264",
    container: str = "mp4",
    pix_fmt: str = "yuv420p",
    rate: int | Fraction = 25,
    times_ms: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    shift: int = 0,
) -> bytes:
    """A video file of `images`; `shift` is subtracted from every packet's times, in frames."""
    out = io.BytesIO()
    with av.open(out, "w", format=container, options=container_options or {}) as file:
        stream = None
        packets = []
        for index, image in enumerate(images):
            if stream is None:
                stream = file.add_stream(codec, rate=rate)
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = pix_fmt
                stream.options = options or {}
                if times_ms is not None:
                    stream.codec_context.time_base = Fraction(1, 1000)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = index, Fraction(1, rate)
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[index], Fraction(1, 1000)
            packets += stream.encode(frame)
        for packet in [*packets, *stream.encode()]:
            ticks = round(shift / rate / packet.time_base)
            packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
            file.mux(packet)
    return out.getvalue()


def clip(count: int, width: int = 64, height: int = 48, **how: object) -> bytes:
    """A video of `count` numbered frames."""
    return encode((numbered(n, width, height) for n in range(count)), **how)  # type: ignore[arg-type]


def repeated(group: bytes, times: int, container: str = "mp4") -> bytes:
    """The packets of the video `group`, shown in the order they are stored in, `times` times over."""
    out = io.BytesIO()
    with av.open(io.BytesIO(group)) as source, av.open(out, "w", format=container) as file:
        stream = source.streams.video[0]
        packets = [(bytes(p), p.pts, p.is_keyframe) for p in source.demux(stream) if p.size]
        target = file.add_stream_from_template(stream)
        step = packets[1][1] - packets[0][1]
        for copy in range(times):
            for index, (data, _, is_key) in enumerate(packets):
                packet = av.Packet(data)
                packet.pts = packet.dts = (copy * len(packets) + index) * step
                packet.time_base, packet.stream, packet.is_keyframe = stream.time_base, target, is_key
                packet.duration = step
                file.mux(packet)
    return out.getvalue()


def tone(container: str = "mp4", codec: str = "aac", picture: bytes | None = None) -> bytes:
    """A second of sound, with the PNG `picture` as a cover if there is one."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        sound = file.add_stream(codec, rate=8000, layout="mono")
        cover = file.add_stream("png", rate=1) if picture else None
        if cover is not None:
            cover.width = cover.height = 8
            cover.pix_fmt = "rgb24"
            cover.disposition = av.stream.Disposition.attached_pic
            still = av.VideoFrame.from_ndarray(np.zeros((8, 8, 3), np.uint8), format="rgb24")
            for packet in [*cover.encode(still), *cover.encode()]:
                file.mux(packet)
        for start in range(0, 8000, 800):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
            frame.rate, frame.pts = 8000, start
            for packet in sound.encode(frame):
                file.mux(packet)
        for packet in sound.encode():
            file.mux(packet)
    return out.getvalue()


@cache
def stuck() -> bytes:
    """A good video of 335 KB that keeps one call of libav busy for a minute: for each tag it reads all."""
    from tests.support.media_fuzz.cases import parse  # which takes its whole files from here

    return parse("mkv: mkv.tags(5000,0)").data()


def box(name: bytes, *parts: bytes) -> bytes:
    """An mp4 box."""
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), name) + body


def full_box(name: bytes, *numbers: int) -> bytes:
    """An mp4 box with version and flags 0 and 32-bit fields."""
    return box(name, bytes(4), struct.pack(f">{len(numbers)}I", *numbers))


def rotated(mp4: bytes, degrees: int) -> bytes:
    """The one-track file `mp4` with a display matrix that turns it clockwise by a multiple of 90."""
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = struct.pack(">9i", cos << 16, sin << 16, 0, -sin * 65536, cos << 16, 0, 0, 0, 1 << 30)
    at = mp4.index(b"tkhd") + 4 + (40 if mp4[mp4.index(b"tkhd") + 4] == 0 else 52)
    return mp4[:at] + matrix + mp4[at + 36 :]


def slow_gif(side: int, count: int) -> bytes:
    """A GIF of `count` frames on a canvas `side` x `side`.

    Each changes one pixel, in a few bytes, and costs its decoder the whole canvas.
    """
    head = b"GIF89a" + struct.pack("<HH", side, side) + b"\x80\0\0\0\0\0\xff\xff\xff"
    frame = b"!\xf9\4\0\x0a\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0"
    return head + frame * count + b";"
