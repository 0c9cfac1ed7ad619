"""The process behind `runner.Runner`: reads cases from its input, forks for each, writes its outcome."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from typing import BinaryIO

import numpy as np

from metok_vllm.media.decoder import DecodedVideo, decode_video
from metok_vllm.media.settings import VideoError, VideoSettings


def described(video: DecodedVideo) -> str:
    """What must be the same each time: shape, numbers and pixels."""
    digest = hashlib.sha256(np.ascontiguousarray(video.frames).tobytes()).hexdigest()[:16]
    shape = "x".join(map(str, video.frames.shape))
    return f"{shape} {video.frames.dtype} of {video.total_frames}, {video.indices}, {video.missing} missing, {digest}"


def inconsistent(video: DecodedVideo, settings: VideoSettings) -> str | None:
    """What does not fit together in `video`."""
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


def answer(data: bytes, settings: VideoSettings) -> tuple[str, str]:
    """Kind and text of what becomes of `data`."""
    try:
        video = decode_video(data, settings)
    except VideoError as error:
        return "refused", str(error)
    except BaseException as error:
        return "broken", f"{type(error).__name__}: {str(error)[:300]}"
    wrong = inconsistent(video, settings)
    return ("broken", wrong) if wrong else ("frames", described(video))


def run(data: bytes, settings: VideoSettings, kill_after_s: float, address_space_mib: int) -> dict[str, object]:
    """Decode `data` in a fork of this process."""
    inlet, outlet = os.pipe()
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(inlet)
        resource.setrlimit(resource.RLIMIT_AS, (address_space_mib << 20, address_space_mib << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(outlet, json.dumps(answer(data, settings)).encode())
        os._exit(0)
    os.close(outlet)
    killed = not select.select([inlet], [], [], kill_after_s)[0]
    seconds = time.monotonic() - start
    if killed:
        os.kill(pid, signal.SIGKILL)
    text = b""
    while part := os.read(inlet, 65536):
        text += part
    os.close(inlet)
    _, status, usage = os.wait4(pid, 0)
    kind, said = (
        json.loads(text) if text else ("broken", f"ended by signal {status & 127}" if not killed else "killed: time")
    )
    return {"kind": kind, "said": said, "seconds": seconds, "peak_mib": usage.ru_maxrss / 1024}


def serve(source: BinaryIO, sink: BinaryIO, kill_after_s: float, address_space_mib: int) -> None:
    """Answer until the input ends."""
    while head := source.read(8):
        how, size = struct.unpack(">II", head)
        settings = VideoSettings(**json.loads(source.read(how)))
        result = run(source.read(size), settings, kill_after_s, address_space_mib)
        sink.write(json.dumps(result).encode() + b"\n")
        sink.flush()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up between the answers
    serve(sys.stdin.buffer, answers, float(sys.argv[1]), int(sys.argv[2]))
