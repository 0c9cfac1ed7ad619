"""vLLM 0.33's limits on the media of one request, all of them together, beside METok's on each video.

What differs: 0.33 has two new limits, by default far below what 0.32 takes.

- ``VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES``, 683 MiB: what the request's media fill once they are decoded
  (vllm/multimodal/media/base.py: `MediaDecodedBudget`). It is charged after decoding, so METok's
  `max_output_mib` (2048) would refuse nothing any more: 32 frames of a 4K video are 759 MiB.
- ``VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB``, 256: what the request's URLs come to
  (vllm/connections.py: `MediaRequestDownloadBudget`). Each file had, and has, 256 of its own
  (``VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB``), and an operator who raised that gets no more by it.

A server with METok gets defaults that leave room for one video of the largest size allowed, whichever limit
that is. So one video is bounded as with 0.32, and a request keeps a bound, which 0.32 has not. What an
operator has set holds. With 0.32 nothing is set: vLLM warns of variables that it does not know.

The look at what vLLM knows can go with vLLM 0.32, the rest when vLLM has no such limits any more, or charges
before it decodes and lets a loader state its own (`tests/unit/test_vllm_versions.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .settings import VideoSettings

DECODED = "VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES"
DOWNLOADED = "VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB"


def leave_room(media_io_kwargs: object) -> None:
    """Set the defaults in this process' environment, which the API server's processes read.

    For a server with METok, before it reads them.

    Args:
        media_io_kwargs: the server's ``--media-io-kwargs``, of which ``{"video": {"max_output_mib": ...}}``
            counts. What is wrong with them is found later, by `loader.prefer_loader`.

    Raises:
        ValueError: one of vLLM's variables is no number.
    """
    from vllm import envs

    if DECODED in envs.environment_variables:
        os.environ.setdefault(DECODED, str(decoded_bytes(media_io_kwargs)))
    if DOWNLOADED in envs.environment_variables:
        one_file, request = envs.VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB, getattr(envs, DOWNLOADED)
        if one_file <= 0 or one_file > request:  # 0: no limit
            os.environ.setdefault(DOWNLOADED, str(one_file))


def decoded_bytes(media_io_kwargs: object) -> int:
    """Bytes that vLLM counts for one video of `max_output_mib`, in whatever form it comes.

    vLLM counts a list of JPEG frames at four bytes a pixel, METok and every other video at three.
    """
    video = media_io_kwargs.get("video") if isinstance(media_io_kwargs, Mapping) else None
    stated: Any = video.get("max_output_mib") if isinstance(video, Mapping) else None
    mib = stated if isinstance(stated, int) and stated > 0 else VideoSettings().max_output_mib
    return (mib << 20) * 4 // 3


def is_exceeded(error: BaseException) -> bool:
    """Whether this is one of the two refusals; vLLM has no type of its own for the first."""
    return any(name in str(error) for name in (DECODED, DOWNLOADED))
