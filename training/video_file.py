"""Real mp4 files through PyAV: write, read, and a round trip that leaves the codec's artefacts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np

from training.draw import Pixels

FPS = 8


def write_mp4(frames: Pixels, target: Path | io.BytesIO, crf: int = 23, scale: int = 1) -> None:
    """Write ``uint8 [T, H, W, 3]`` as H.264 yuv420p at 8 frames a second.

    Args:
        frames: RGB frames, H and W even.
        target: path or buffer.
        crf: quality of libx264 (lower is better; 18 to 28 is what training sees).
        scale: whole-number enlargement, for watching; the model's processor scales back.
    """
    if scale != 1:
        frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    destination: Any = str(target) if isinstance(target, Path) else target
    with av.open(destination, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"crf": str(crf), "preset": "veryfast"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def read_mp4(source: Path | io.BytesIO) -> Pixels:
    """All frames of the first video stream: ``uint8 [T, H, W, 3]``, RGB."""
    origin: Any = str(source) if isinstance(source, Path) else source
    with av.open(origin) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def through_codec(frames: Pixels, crf: int = 23) -> Pixels:
    """The frames as they come back from a file of quality ``crf``."""
    buffer = io.BytesIO()
    write_mp4(frames, buffer, crf)
    buffer.seek(0)
    return read_mp4(buffer)
