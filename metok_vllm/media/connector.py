"""vLLM's media connector, with a client's error for whatever is wrong with the media of a request.

vLLM's own answers 5xx where a URL names a file and requests may name none, where a data URL is not base64,
where a picture is a decompression bomb, and where the server that a URL names cannot be reached. And of a
list of JPEG frames it takes the first `num_frames` without a word, and decodes all of these before anything
is counted.

Registered by the name "metok"; vLLM takes it where the environment variable ``VLLM_MEDIA_CONNECTOR`` says so,
which `frontend/command_line.py` sets for a server with METok.
"""

from __future__ import annotations

import asyncio
import binascii
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import unquote_to_bytes

import aiohttp
import requests
from PIL import Image
from vllm import envs
from vllm.exceptions import VLLMClientError, VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.image import open_image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, VideoMediaIO
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

from metok_vllm.contract.advice import all_frames
from metok_vllm.contract.refusals import count_refused, refusing
from metok_vllm.contract.request_ids import printable

from .data_urls import DataUrlError, decoded, not_base64, padded, read_data_url
from .in_force import chosen_loader, decode_pool
from .loader import MetokVideoLoader, VideoBusyError, request_errors, request_settings
from .request_limits import is_exceeded
from .settings import VideoError, VideoSettings

CONNECTOR_NAME = "metok"
_FRAMES, _FILE = "video/jpeg", "file:"
# What fails for the sake of the server that a URL names, not of this one. In Python 3.10 asyncio has a
# TimeoutError of its own.
_FETCHING = (
    aiohttp.ClientError,
    requests.exceptions.RequestException,
    asyncio.TimeoutError,
    TimeoutError,
    ConnectionError,
)


class MetokMediaConnector(MediaConnector):
    """Fetches media as vLLM does; whatever is wrong with them becomes HTTP 400 or 422 and one sentence."""

    def fetch_video(self, video_url: str, **kwargs: Any) -> Any:
        self._check_video_backend()
        return super().fetch_video(video_url, **kwargs)

    async def fetch_video_async(self, video_url: str, **kwargs: Any) -> Any:
        self._check_video_backend()
        return await super().fetch_video_async(video_url, **kwargs)

    def load_from_url(self, url: str, media_io: Any, **kwargs: Any) -> Any:
        url = url.lstrip()
        with client_errors(url), _counting(media_io):
            self._check(url)
            return super().load_from_url(url, media_io, **kwargs)

    async def load_from_url_async(self, url: str, media_io: Any, **kwargs: Any) -> Any:
        """As vLLM's, but a video file that is being decoded takes none of vLLM's threads for media."""
        url = url.lstrip()
        with client_errors(url), _counting(media_io):
            self._check(url)
            if not decodes_with_metok(media_io):
                return await super().load_from_url_async(url, media_io, **kwargs)
            loaded = await super().load_from_url_async(url, undecoded(media_io), **kwargs)
            return await decoded_video(media_io, loaded) if isinstance(loaded, bytes) else loaded

    def _load_data_url(self, url: str, media_io: Any) -> Any:
        """In the place of vLLM's (vllm/multimodal/media/connector.py), which knows one spelling alone."""
        is_video = isinstance(media_io, VideoMediaIO)
        with refusing("video") if is_video else nullcontext():
            media_type, data = read_data_url(url)
        try:
            if is_video and media_type == _FRAMES:
                return self._load_jpeg_frames(media_io, media_type, data)
            return media_io.load_base64(media_type, padded(data))
        except binascii.Error:
            if is_video:
                count_refused("video")
            raise not_base64(data) from None

    def _load_file_url(self, url_spec: Any, media_io: Any) -> Any:
        """As vLLM's, which takes names for UTF-8 and so does not find all others."""
        path = os.fsdecode(unquote_to_bytes(f"{url_spec.netloc or ''}{url_spec.path or ''}"))
        named = url_spec._replace(host=None, port=None, path=path.replace("%", "%25"))
        try:
            return super()._load_file_url(named, media_io)
        except ValueError as error:
            if str(error).isprintable():
                raise
            raise VLLMValidationError(printable(str(error))) from None  # it quotes the name

    def _load_jpeg_frames(self, media_io: Any, media_type: str, data: str) -> Any:
        """A list of frames, which vLLM decodes in this process: within the same budget as those of a file."""
        with request_errors():
            limits = self._video_limits()
            size = check_jpeg_frames(data, media_io.num_frames, limits)
            pool = decode_pool()
            grant = pool.hold(size, limits.timeout_s)
        try:
            loaded = media_io.load_base64(media_type, padded(data))
        except BaseException:
            pool.memory.give_back(grant)
            raise
        pool.give_back_with(grant, loaded.media[0])
        return loaded

    def _check(self, url: str) -> None:
        if _starts(url, _FILE) and self.allowed_local_media_path is None:
            raise VLLMValidationError(
                "This server takes no files: send a URL that it may fetch, or the data themselves."
            )

    def _check_video_backend(self) -> None:
        """Refuse the name of a loader that does not exist, which vLLM finds by an assertion, and any but the
        server's: a request could so get around its limits.
        """
        name = self.media_io_kwargs.get("video", {}).get("video_backend")
        if name and not (isinstance(name, str) and name in VIDEO_LOADER_REGISTRY.name2class):
            raise VLLMValidationError(f"There is no video_backend {name!r:.60} (media_io_kwargs).")
        if name and name != (chosen_loader() or name):
            raise VLLMValidationError(
                f"This server reads videos with video_backend {chosen_loader()!r}; a request cannot choose another."
            )

    def _video_limits(self) -> VideoSettings:
        """The loader's limits, which hold for frames in a list too;
        vLLM has keys of its own for these, left to vLLM.
        """
        known = {field.name for field in fields(VideoSettings)}
        given = {key: value for key, value in self.media_io_kwargs.get("video", {}).items() if key in known}
        return request_settings(given)


def decodes_with_metok(media_io: Any) -> bool:
    """Whether this is vLLM's reader of a video, with METok's loader in it."""
    return isinstance(media_io, VideoMediaIO) and isinstance(media_io.video_loader, MetokVideoLoader)


def undecoded(media_io: VideoMediaIO) -> VideoMediaIO:
    """A reader that gives a video file as its bytes, and a list of frames as `media_io` does."""
    fetching: Any = copy(media_io)
    fetching.load_bytes = bytes
    return fetching  # type: ignore[no-any-return]


async def decoded_video(media_io: VideoMediaIO, data: bytes) -> Any:
    """What `media_io` makes of the file `data`, decoded without a thread."""
    loaded = await MetokVideoLoader.load_bytes_async(data, num_frames=media_io.num_frames, **media_io.kwargs)
    ready: Any = copy(media_io)
    ready.video_loader = Loaded(loaded)
    # In a thread, since vLLM 0.33 may let it wait for the request's other media.
    return await asyncio.to_thread(ready.load_bytes, data)


@dataclass(frozen=True)
class Loaded:
    """A loader that has done its work before."""

    loaded: Any

    def load_bytes(self, data: bytes, **_: Any) -> Any:
        return self.loaded


def check_jpeg_frames(data: str, num_frames: int, limits: VideoSettings) -> int:
    """Refuse a list of frames that is too long or takes too much memory, before the first one is decoded.

    Args:
        data: JPEG files in base64, joined by commas; as `data_urls.DataUrl.data`.
        num_frames: how many frames the request's settings take; -1 for all.
        limits: `max_frames`, `max_pixels` and `max_output_mib` count.

    Returns:
        Bytes that the frames take, RGB.

    Raises:
        VideoError: in one sentence.
    """
    count = data.count(",") + 1
    if 0 < num_frames < count:
        raise VideoError(
            f"The video is a list of {count} frames and num_frames is {num_frames}: send fewer, or {all_frames()}."
        )
    if count > limits.max_frames:
        raise VideoError(
            f"The video is a list of {count} frames, more than {limits.max_frames} (video setting max_frames)."
        )
    most = limits.max_pixels if envs.VLLM_MAX_IMAGE_PIXELS <= 0 else min(limits.max_pixels, envs.VLLM_MAX_IMAGE_PIXELS)
    total = 0
    for part in data.split(","):
        width, height = _picture_size(part)
        if width * height > most:
            raise VideoError(
                f"The video's frames of {width} x {height} have more than {most} pixels (video setting max_pixels)."
            )
        total += 3 * width * height
        if total > limits.max_output_mib << 20:
            raise VideoError(
                f"The video's {count} frames fill more than {limits.max_output_mib} MiB (video setting max_output_mib)."
            )
    return total


def _picture_size(part: str) -> tuple[int, int]:
    """Width and height that a picture's header states."""
    try:
        with open_image(io.BytesIO(decoded(part))) as picture:
            return picture.size
    except Image.DecompressionBombError:
        raise VideoError("A frame of the video has far more pixels than a picture may have.") from None
    except (OSError, DataUrlError):
        raise VideoError("A frame of the video is not a JPEG file in base64.") from None


@contextmanager
def _counting(media_io: Any) -> Iterator[None]:
    """Count a video that vLLM's limits on a whole request refuse; the loader counts by itself."""
    try:
        yield
    except (ValueError, VLLMClientError) as error:
        if isinstance(media_io, VideoMediaIO) and is_exceeded(error):
            count_refused("video")
        raise


@contextmanager
def client_errors(url: str) -> Iterator[None]:
    """Turn what goes wrong with a request's media into a client's error
    that tells nothing of the network behind us.
    """
    try:
        yield
    except (VLLMClientError, VideoBusyError):
        raise
    except DataUrlError as error:
        raise VLLMValidationError(str(error)) from error
    except Image.DecompressionBombError as error:
        raise VLLMValidationError("The picture has far more pixels than a picture may have.") from error
    except _FETCHING as error:
        raise VLLMUnprocessableEntityError(
            "Failed to fetch media from URL: its server cannot be reached, or does not give the file."
        ) from error
    except OSError as error:
        if not _starts(url, _FILE):
            raise
        raise VLLMValidationError("The media file cannot be read.") from error


def _starts(url: str, scheme: str) -> bool:
    return url[: len(scheme)].lower() == scheme


def register_connector() -> None:
    """Make the connector known to vLLM by its name; calling it again changes nothing."""
    MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR_NAME)(MetokMediaConnector)
