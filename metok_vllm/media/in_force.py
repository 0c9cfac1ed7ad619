"""What holds for videos in this process, as its operator has set it, and the pool that decodes them.

Set when the configuration is built (`frontend/startup.py`), and again when an API server starts
(`serve/routes.py`): with several of them, the configuration comes to most of these processes ready-made.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from vllm import envs

from metok_vllm.contract.settings import MetokSettings
from metok_vllm.media.children.pool import DecodePool
from metok_vllm.media.settings import PoolLimits, VideoError, VideoSettings

LOADER_NAME = "metok"
_LOADER_KEY = "video_backend"

LIMITS = (
    "max_frames",
    "max_pixels",
    "max_output_mib",
    "max_source_frames",
    "max_decoded_frames",
    "timeout_s",
    "threads",
)
"""Settings of a video that bound its cost. A request may lower them, never raise them."""


@dataclass
class _InForce:
    server: VideoSettings = field(default_factory=VideoSettings)
    loader: str | None = None
    pool_limits: PoolLimits = field(default_factory=PoolLimits)
    pool: DecodePool | None = None


_in_force = _InForce()
_lock = threading.Lock()


def set_in_force(
    media_io_kwargs: MutableMapping[str, dict[str, Any]],
    settings: MetokSettings,
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """State what the operator has set, and make "metok" the loader where nothing else is chosen.

    Args:
        media_io_kwargs: of ``--media-io-kwargs``, changed in place. Keys for "video" are METok's; they are
            checked here, before requests come.
        settings: the server's; what all videos together may take counts.
        sampling: the model's own sampling, for METok's loader, where the operator has stated no other. A
            configuration that comes ready-made holds it already.

    Raises:
        VideoError: unknown or impossible keys.
    """
    loader, server = prefer_loader(media_io_kwargs, sampling)
    pool_limits = PoolLimits(settings.videos_at_once, settings.videos_waiting, settings.video_memory_mib)
    with _lock:
        _in_force.server, _in_force.loader = server, loader
        stopped = _in_force.pool is not None and _in_force.pool.stopped  # by a server of this process that has ended
        if stopped or pool_limits != _in_force.pool_limits:
            # One that is in use lives until its videos are done.
            _in_force.pool_limits, _in_force.pool = pool_limits, None


def prefer_loader(
    media_io_kwargs: MutableMapping[str, dict[str, Any]], sampling: Mapping[str, Any] | None = None
) -> tuple[str, VideoSettings]:
    """Make "metok" the default loader in a server's `media_io_kwargs`, and check the keys meant for it.

    A loader that the operator chose, by the key ``video_backend`` or by ``VLLM_VIDEO_LOADER_BACKEND``, is
    left alone.

    Returns:
        The loader's name and the server's settings for a video. Keys of another loader are its own: METok's
        limits have their defaults then.

    Raises:
        VideoError: unknown or impossible keys.
    """
    video = media_io_kwargs.setdefault("video", {})
    if _LOADER_KEY not in video and not envs.is_set("VLLM_VIDEO_LOADER_BACKEND"):
        video[_LOADER_KEY] = LOADER_NAME
    loader = str(video.get(_LOADER_KEY) or envs.VLLM_VIDEO_LOADER_BACKEND)
    if loader == LOADER_NAME and sampling:
        # Of the two that say how many frames, one that is stated stands alone.
        stated = {"fps", "num_frames"} & set(video)
        for key, value in sampling.items():
            if key not in ("fps", "num_frames") or not stated:
                video.setdefault(key, value)
    return loader, check_video_kwargs(video) if loader == LOADER_NAME else VideoSettings()


def check_video_kwargs(video: Mapping[str, Any]) -> VideoSettings:
    """The settings that the "video" mapping of ``--media-io-kwargs`` states; raises `VideoError` if wrong."""
    return VideoSettings.from_mapping({key: value for key, value in video.items() if key != _LOADER_KEY})


def decode_pool() -> DecodePool:
    """This process's pool; made on first use."""
    with _lock:
        if _in_force.pool is None:
            _in_force.pool = DecodePool(_in_force.pool_limits)
        return _in_force.pool


def chosen_loader() -> str | None:
    """Name of the loader that requests take; None where no configuration has been built here."""
    return _in_force.loader


def check_within(settings: VideoSettings) -> None:
    """Refuse settings of a request that raise a limit.

    Raises:
        VideoError: in one sentence.
    """
    for name in LIMITS:
        most = getattr(_in_force.server, name)
        if getattr(settings, name) > most:
            raise VideoError(
                f"A request may lower the video setting {name}, not raise it; on this server it is {most}."
            )
