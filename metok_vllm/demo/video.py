"""The demo's video: its bytes as they are sent, and the sampled frames as the server sees them."""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from metok_vllm.demo.errors import DemoError
from metok_vllm.media.decoder import decode_video
from metok_vllm.media.settings import VideoError, VideoSettings

MOST_FRAMES = VideoSettings.max_frames
"""The plugin's video loader refuses more than this by default."""

_THUMBNAIL_WIDTH = 240  # pixels


@dataclass(frozen=True)
class SampledVideo:
    """A video file and T sampled frames of it."""

    name: str
    data: bytes
    thumbnails: npt.NDArray[np.uint8]
    """[T, h, w, 3] RGB, at most `_THUMBNAIL_WIDTH` wide."""
    times: list[float]
    """[T] seconds from the start at which each frame is shown; frame numbers where the file tells no rate."""
    duration: float
    """Seconds (frames where the rate is unknown)."""
    timed: bool
    """Whether `times` and `duration` are seconds."""

    def in_groups(self, groups: int) -> SampledVideo:
        """The first frame of each of `groups`, where the model takes its frames in pairs or more at a time.

        Unchanged where the frames do not come out at that many groups.
        """
        size = -(-len(self.times) // groups) if groups else 1
        if size < 2 or -(-len(self.times) // size) != groups:
            return self
        return replace(self, thumbnails=self.thumbnails[::size], times=self.times[::size])

    @property
    def data_url(self) -> str:
        """The file as a URL that carries it."""
        return "data:video/mp4;base64," + base64.b64encode(self.data).decode("ascii")


def load_video(path: Path, frames: int) -> SampledVideo:
    """Read a video file and sample `frames` frames, evenly, as the plugin's loader does in the server.

    Raises:
        DemoError: it cannot be read, or is not a video.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DemoError(f"Cannot read the video {path}: {error.strerror or error}.") from None
    try:
        video = decode_video(data, VideoSettings(num_frames=frames))
    except VideoError as error:
        raise DemoError(f"Cannot use {path} as a video: {error}") from None
    timed = video.fps > 0
    rate = video.fps if timed else 1.0
    step = max(1, -(-video.frames.shape[2] // _THUMBNAIL_WIDTH))
    return SampledVideo(
        name=path.name,
        data=data,
        thumbnails=_smaller(video.frames, step),
        times=[index / rate for index in video.indices],
        duration=video.total_frames / rate,
        timed=timed,
    )


def _smaller(frames: npt.NDArray[np.uint8], step: int) -> npt.NDArray[np.uint8]:
    """Frames [T, H, W, 3] shrunk by the whole number `step`: the mean of each `step` x `step` block."""
    count, height, width, _ = frames.shape
    rows, columns = height // step, width // step
    if step == 1 or rows == 0 or columns == 0:
        return frames
    small = np.empty((count, rows, columns, 3), dtype=np.uint8)
    for i, frame in enumerate(frames):  # one at a time: floats of all frames would fill the memory
        blocks = frame[: rows * step, : columns * step].reshape(rows, step, columns, step, 3)
        small[i] = blocks.mean(axis=(1, 3)).round()
    return small
