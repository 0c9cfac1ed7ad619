"""Video files for requests, and the frames that the server will see in them."""

from __future__ import annotations

import base64
import io

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metok_vllm.media.decoder import decode_video
from metok_vllm.media.settings import VideoSettings

FPS = 4
"""Of the videos here, unless a test says otherwise."""


def mp4(frames: NDArray[np.uint8], rate: int = FPS) -> bytes:
    """Encode frames uint8 [T, H, W, 3] (even sides) as an mp4 file, which is the same every time.

    With adaptive quantisation, which the preset leaves out, x264 reads memory that it has not written where a
    side is no multiple of 16.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for picture in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def data_url(video: bytes) -> str:
    return "data:video/mp4;base64," + base64.b64encode(video).decode()


def png_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def jpegs(frames: NDArray[np.uint8]) -> str:
    """The data URL of frames uint8 [T, H, W, 3] as JPEG files, as vLLM takes them."""
    parts = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=95)
        parts.append(base64.b64encode(buffer.getvalue()).decode())
    return "data:video/jpeg;base64," + ",".join(parts)


def seen(video: bytes) -> NDArray[np.uint8]:
    """The frames that METok's loader gives the model with vLLM's default settings, uint8 [T, H, W, 3]."""
    frames: NDArray[np.uint8] = decode_video(video, VideoSettings(num_frames=32)).frames
    return frames


def seen_jpegs(url: str) -> NDArray[np.uint8]:
    """The frames in what `jpegs` returned, uint8 [T, H, W, 3]."""
    files = (io.BytesIO(base64.b64decode(part)) for part in url.partition(",")[2].split(","))
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
