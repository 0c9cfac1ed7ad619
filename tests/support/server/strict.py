"""The server that strangers meet in the tests: little room, a key, a path in front, a folder of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.support.oracle.samples import scene_video
from tests.support.server.asking import OPTIONS
from tests.support.server.clips import mp4

KEY = "the-operators-key"
ROOT = "/behind/a-proxy"
AT_ONCE, WAITING, MEMORY_MIB = 2, 2, 200
GOOD = mp4(scene_video(71, 14))
PERCENT = b"50%25 off.mp4"
ODD = b"\xff\xfe caf\xe9.mp4"
"""A file's name outside UTF-8."""


def media_folder(top: Path) -> Path:
    """What the server may read from its disk, and a link that leads out of it."""
    inside = top / "inside"
    inside.mkdir()
    (inside / "good.mp4").write_bytes(GOOD)
    (inside / os.fsdecode(ODD)).write_bytes(GOOD)
    (inside / os.fsdecode(PERCENT)).write_bytes(GOOD)
    (top / "secret.mp4").write_bytes(GOOD)
    (inside / "link.mp4").symlink_to(top / "secret.mp4")
    return inside


def options(folder: Path) -> list[str]:
    """For `vllm serve`."""
    limits = {"videos_at_once": AT_ONCE, "videos_waiting": WAITING, "video_memory_mib": MEMORY_MIB}
    return [
        "--plugin", "metok", "--additional-config", json.dumps({"metok": limits}), "--api-key", KEY,
        "--root-path", ROOT, "--enable-scale-out", "--trust-request-mm-kwargs", "--trust-request-chat-template",
        "--max-num-batched-tokens", "256", "--served-model-name", "tiny", "--allowed-local-media-path", str(folder),
        "--num-gpu-blocks-override", "4096", *OPTIONS,
    ]  # fmt: skip
