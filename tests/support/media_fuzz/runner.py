"""Decodes one case at a time with the server's own pool of child processes, and measures the child."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metok_vllm.media.children.pool import DecodePool
from metok_vllm.media.decoder import DecodedVideo
from metok_vllm.media.settings import PoolLimits, VideoError, VideoSettings
from tests.support.children import frames_mib

POOL_MIB = 512
"""What the pool grants to decoders and their frames."""
_LOOK_EVERY_S = 0.004


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    kind: str
    """"frames", "refused" (a `VideoError`), or "broken": anything else."""
    said: str
    """The sentence; or the frames' shape, numbers and digest; or what broke."""
    seconds: float
    """Wall time of the decode."""
    peak_mib: float
    """The most memory that the child held, frames included; 0 where it was gone too soon to look."""


def described(video: DecodedVideo) -> str:
    """What must be the same each time: shape, numbers and pixels."""
    digest = hashlib.sha256(np.ascontiguousarray(video.frames).tobytes()).hexdigest()[:16]
    shape = "x".join(map(str, video.frames.shape))
    return f"{shape} {video.frames.dtype} of {video.total_frames}, {video.indices}, {video.missing} missing, {digest}"


def inconsistent(video: DecodedVideo, settings: VideoSettings) -> str | None:
    """What does not fit together in `video`, or None."""
    frames, indices = video.frames, video.indices
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        return f"frames of shape {frames.shape} and type {frames.dtype}"
    if not len(frames) == len(indices) > 0 or indices != sorted(set(indices)) or indices[-1] >= video.total_frames:
        return f"{len(frames)} frames, numbers {indices} of {video.total_frames}"
    if indices[0] < 0 or len(indices) + video.missing > settings.num_frames > 0:
        return f"{len(indices)} frames and {video.missing} missing, of {settings.num_frames}"
    if not (video.fps >= 0 and video.duration >= 0 and np.isfinite([video.fps, video.duration]).all()):
        return f"{video.fps} frames a second over {video.duration} s"
    return None


class Runner:
    """A pool of `POOL_MIB`; ended by `close`."""

    def __init__(self) -> None:
        before = _children(None)
        self._pool = DecodePool(PoolLimits(at_once=2, waiting=2, memory_mib=POOL_MIB))
        self._pool.start()
        self._spawners = _children(None) - before

    def run_one(self, data: bytes, settings: VideoSettings) -> Outcome:
        """Decode `data`."""
        with _Peak(self._spawners) as peak:
            start = time.monotonic()
            kind, said = self._answer(data, settings)
            seconds = time.monotonic() - start
        return Outcome(kind, said, seconds, peak.mib)

    def _answer(self, data: bytes, settings: VideoSettings) -> tuple[str, str]:
        try:
            video = self._pool.decode(data, settings)
        except VideoError as error:
            return "refused", str(error)
        except Exception as error:
            return "broken", f"{type(error).__name__}: {str(error)[:300]}"
        wrong = inconsistent(video, settings)
        return ("broken", wrong) if wrong else ("frames", described(video))

    def close(self) -> None:
        """End the pool's processes."""
        self._pool.stop()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Peak:
    """Looks, while it is entered, at the memory of the children of some processes."""

    def __init__(self, parents: set[int]) -> None:
        self.mib = 0.0
        self._parents = parents
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(_LOOK_EVERY_S):
            for child in (child for parent in self._parents for child in _children(parent)):
                self.mib = max(self.mib, _high_water_mib(child) + frames_mib(child))


def _children(pid: int | None) -> set[int]:
    """Processes that `pid`, or any thread of this process, has started."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid or 'self'}/task").glob("*/children"):
        with suppress(OSError):  # the thread, or the process, has ended
            found |= {int(child) for child in task.read_text().split()}
    return found


def _high_water_mib(pid: int) -> float:
    """The most memory that a process has held so far; 0 if it has ended."""
    with suppress(OSError):
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(match[1]) / 1024 if match else 0.0
    return 0.0
