"""The decoder as a video loader of vLLM, by the name "metok".

vLLM chooses a loader by ``video_backend`` in ``--media-io-kwargs '{"video": {...}}'``, else by the
environment variable ``VLLM_VIDEO_LOADER_BACKEND``, and hands every other key of that mapping to
`load_bytes`; here they are the fields of `VideoSettings`. Whatever is wrong with a video or a key becomes
`VideoRequestError`, which vLLM's OpenAI server answers with 400 and its message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm import envs
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader
from vllm.multimodal.video_decoders import VideoSourceMetadata

from metok_vllm.contract.refusals import count_refused
from metok_vllm.log import metok_logger

from .children.pool import Busy
from .decoder import DecodedVideo
from .in_force import LOADER_NAME, check_within, decode_pool
from .settings import VideoError, VideoSettings

logger = metok_logger(__name__)

Loaded = tuple[npt.NDArray[np.uint8], dict[str, Any]]
"""Frames ``[T, H, W, 3]`` RGB uint8 and vLLM's metadata."""


class VideoRequestError(VLLMValidationError, VideoError):
    """A `VideoError` of the type that vLLM's entry points turn into HTTP 400; still a `ValueError`."""


class VideoBusyError(GracefulHTTPError):
    """There is no room for a video now: HTTP 503."""

    def __init__(self, message: str) -> None:
        super().__init__(message, HTTPStatus.SERVICE_UNAVAILABLE)


class MetokVideoLoader(VideoLoader):
    """Loads sampled frames through `decode_pool`, in the form of vLLM's other loaders."""

    @classmethod
    def load_bytes(cls, data: bytes, **kwargs: Any) -> Loaded:
        """Decode in a child process, and wait for it; `kwargs` are the fields of `VideoSettings`.

        Raises:
            VideoRequestError: in one sentence, for an unusable video and for unknown or impossible `kwargs`.
            VideoBusyError: the server has no room for it now.
        """
        with request_errors():
            return cls.loaded(decode_pool().decode(data, request_settings(kwargs)))

    @classmethod
    async def load_bytes_async(cls, data: bytes, **kwargs: Any) -> Loaded:
        """As `load_bytes`, without holding a thread; cancelling it ends the child."""
        with request_errors():
            return cls.loaded(await decode_pool().decode_async(data, request_settings(kwargs)))

    @classmethod
    def loaded(cls, video: DecodedVideo) -> Loaded:
        """A decoded video in vLLM's form; says so in the log where frames are missing."""
        if video.missing:
            logger.warning(
                "A video is damaged: %d of %d wanted frames could not be decoded and are left out.",
                video.missing,
                video.missing + len(video.indices),
            )
        source = VideoSourceMetadata(video.total_frames, video.fps, video.duration)
        return video.frames, cls.create_hf_metadata(source, video.indices, LOADER_NAME)


def request_settings(kwargs: Mapping[str, Any]) -> VideoSettings:
    """The settings of one video, within the server's limits; raises `VideoError` if they are wrong."""
    settings = VideoSettings.from_mapping(kwargs)
    check_within(settings)
    if envs.VLLM_MAX_IMAGE_PIXELS > 0:
        settings = replace(settings, max_pixels=min(settings.max_pixels, envs.VLLM_MAX_IMAGE_PIXELS))
    return settings


@contextmanager
def request_errors() -> Iterator[None]:
    """Turn what goes wrong with a video into an error that vLLM answers with its own status; count it."""
    try:
        yield
    except VideoError as error:
        count_refused("video")
        raise VideoRequestError(str(error)) from error
    except Busy as error:
        count_refused("busy")
        raise VideoBusyError(str(error)) from None


def register_loader() -> None:
    """Make the loader known to vLLM by its name; calling it again changes nothing."""
    VIDEO_LOADER_REGISTRY.register(LOADER_NAME)(MetokVideoLoader)
