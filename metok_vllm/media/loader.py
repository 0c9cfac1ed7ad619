"""The decoder as a video loader of vLLM, by the name "metok".

vLLM chooses a loader by ``video_backend`` in ``--media-io-kwargs '{"video": {...}}'``, else by the
environment variable ``VLLM_VIDEO_LOADER_BACKEND``, and hands every other key of that mapping to
`load_bytes`; here they are the fields of `VideoSettings`. Whatever is wrong with a video or a key becomes
`VideoRequestError`, which vLLM's OpenAI server answers with 400 and its message.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader
from vllm.multimodal.video_decoders import VideoSourceMetadata

from metok_vllm.contract.refusals import count_refused
from metok_vllm.log import metok_logger

from .settings import VideoError, VideoSettings

LOADER_NAME = "metok"
_LOADER_KEY = "video_backend"

logger = metok_logger(__name__)


class VideoRequestError(VLLMValidationError, VideoError):
    """A `VideoError` of the type that vLLM's entry points turn into HTTP 400; still a `ValueError`."""


class MetokVideoLoader(VideoLoader):
    """Loads sampled frames with `decode_video`, in the form of vLLM's other loaders."""

    @classmethod
    def load_bytes(cls, data: bytes, **kwargs: Any) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
        """Frames ``[T, H, W, 3]`` RGB uint8 and vLLM's metadata; `kwargs` are the fields of `VideoSettings`.

        Raises `VideoRequestError`, one sentence, for an unusable video and for unknown or impossible
        `kwargs`.
        """
        # PyAV is needed for files only: a machine without it still serves frames that come as arrays.
        from .decoder import decode_video

        try:
            settings = VideoSettings.from_mapping(kwargs)
            if envs.VLLM_MAX_IMAGE_PIXELS > 0:
                settings = replace(settings, max_pixels=min(settings.max_pixels, envs.VLLM_MAX_IMAGE_PIXELS))
            video = decode_video(data, settings)
        except VideoError as error:
            count_refused("video")
            raise VideoRequestError(str(error)) from error
        except MemoryError as error:
            raise VideoRequestError("The video needs more memory than the server has free.") from error
        if video.missing:
            logger.warning(
                "A video is damaged: %d of %d wanted frames could not be decoded and are left out.",
                video.missing,
                video.missing + len(video.indices),
            )
        source = VideoSourceMetadata(video.total_frames, video.fps, video.duration)
        return video.frames, cls.create_hf_metadata(source, video.indices, LOADER_NAME)


def register_loader() -> None:
    """Make the loader known to vLLM by its name; calling it again changes nothing."""
    VIDEO_LOADER_REGISTRY.register(LOADER_NAME)(MetokVideoLoader)


def prefer_loader(media_io_kwargs: MutableMapping[str, dict[str, Any]]) -> None:
    """Make "metok" the default loader in a server's `media_io_kwargs`, and check the keys meant for it.

    For a config hook, before requests come: a wrong key would otherwise show in the first request only. A
    loader that the operator chose, by the key ``video_backend`` or by ``VLLM_VIDEO_LOADER_BACKEND``, is left
    alone. Raises `VideoError` for unknown or impossible keys.
    """
    video = media_io_kwargs.setdefault("video", {})
    if _LOADER_KEY not in video and not envs.is_set("VLLM_VIDEO_LOADER_BACKEND"):
        video[_LOADER_KEY] = LOADER_NAME
    if (video.get(_LOADER_KEY) or envs.VLLM_VIDEO_LOADER_BACKEND) == LOADER_NAME:
        check_video_kwargs(video)


def check_video_kwargs(video: Mapping[str, Any]) -> VideoSettings:
    """The settings that the "video" mapping of ``--media-io-kwargs`` states; raises `VideoError` if wrong."""
    return VideoSettings.from_mapping({key: value for key, value in video.items() if key != _LOADER_KEY})
