"""Interlaced H.264: both fields of a frame come out as one frame, and it is found at the same time."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from metok_vllm.media.decoder import decode_video
from metok_vllm.media.settings import VideoSettings


def film(order: str, container: str) -> bytes:
    """24 frames, each brighter than the one before, as macroblocks of fields and of frames."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream("libx264", rate=8, options={"x264-params": f"{order}=1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(24):
            picture = np.full((64, 64, 3), 10 * i, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize("order", ["tff", "bff"], ids=["top field first", "bottom field first"])
@pytest.mark.parametrize("container", ["mp4", "mpegts", "matroska"])
def test_interlaced_h264(order: str, container: str) -> None:
    data = film(order, container)
    with av.open(io.BytesIO(data)) as file:
        assert all(frame.interlaced_frame for frame in file.decode(video=0)), "the film is not interlaced"
    whole = decode_video(data, VideoSettings(num_frames=-1)).frames
    assert len(whole) == 24
    for i, frame in enumerate(whole):
        assert abs(float(frame.mean()) - 10 * i) < 4
    picked = decode_video(data, VideoSettings(num_frames=8)).frames
    assert len(picked) == 8
    assert all(any(np.array_equal(one, other) for other in whole) for one in picked)
