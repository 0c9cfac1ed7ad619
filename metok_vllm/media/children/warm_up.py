"""What a process does ahead, so that the first file need not wait for it.

The process that forks imports all that a decode needs. A child that waits for a file decodes one of its own
making first: most of what a short video costs a child is memory that it touches for the first time.
"""

from __future__ import annotations

import importlib
import io
import pkgutil
from contextlib import suppress
from typing import Any

import av
import numpy as np

from metok_vllm.media.decoder import decode_video
from metok_vllm.media.settings import VideoError, VideoSettings

PICTURE = b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff!\xf9\4\0\0\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;"
"""A whole video: a GIF of one black pixel."""

_HEAP = 16 << 20
"""Bytes of memory that a waiting child has touched and keeps for its file."""

_NOT_DECODING = ("av.__main__", "av.datasets")  # they load what fetches files


def import_all() -> None:
    """Import and run once, before the first fork, all that a decode runs: a child can open no file."""
    # PyAV imports a part of itself when it first meets a stream of that kind: subtitles, for one.
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if module.name not in _NOT_DECODING:
            importlib.import_module(module.name)
    for data in (PICTURE, b"", b"no video", PICTURE[:20]):
        with suppress(VideoError):
            decode_video(data, VideoSettings(timeout_s=10))


def small_clip() -> bytes:
    """A clip of noise as most videos are coded: H.264 in MP4; another kind where libav cannot make that."""
    for codec in ("libx264", "mpeg4"):
        with suppress(av.FFmpegError, ValueError):
            return _encoded(codec)
    return PICTURE


def touch(clip: bytes) -> None:
    """Run through the code and the memory that a video takes."""
    with suppress(VideoError, MemoryError):
        heap = np.empty(_HEAP, np.uint8)
        heap[::4096] = 1
        del heap  # it stays in the allocator's hands (`forks`)
        decode_video(clip, VideoSettings(num_frames=4, timeout_s=10))


def _encoded(codec: str) -> bytes:
    file, noise = io.BytesIO(), np.random.default_rng(0)
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        stream.codec_context.thread_count = 1  # what it started would be missing in a fork
        for _ in range(8):
            small = noise.integers(0, 255, (30, 40, 3), np.uint8)
            picture = small.repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
