"""Settings and the one error type of the video decoder. Imports nothing outside the standard library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


class VideoError(ValueError):
    """A video, or a setting for reading it, that cannot be used; the message is one sentence for the user."""


class VideoMemoryError(VideoError):
    """A video that takes more memory than it may."""


# Lowest and highest value of every integer setting; -1 is let through where it means "no wish".
_INT_RANGES: dict[str, tuple[int, int]] = {
    "num_frames": (1, 1_000_000),
    "max_frames": (1, 1_000_000),
    "max_pixels": (1, 2**28),
    "max_output_mib": (1, 1_048_576),
    "max_source_frames": (1, 10_000_000),
    "max_decoded_frames": (1, 10_000_000),
    "threads": (1, 64),
}

SAMPLINGS = ("uniform", "qwen2_vl", "qwen3_vl")
"""Ways to choose frames: `media/sampling.py`."""


def _setting(default: Any, description: str) -> Any:
    """A field with what `docs/options.md` says of it."""
    return field(default=default, metadata={"description": description})


@dataclass(frozen=True)
class VideoSettings:
    """What to sample and how much work one video may cause; the keys of ``--media-io-kwargs`` for "video".

    Raises `VideoError` at construction for a wrong type or a value out of range.
    """

    num_frames: int = _setting(
        -1, "Frames to sample, evenly over the video; -1 for all. vLLM passes 32 where nobody says otherwise."
    )
    fps: float = _setting(
        -1, "Frames to sample per second; -1 for no limit. Of `num_frames` and this, the fewer frames count."
    )
    sampling: str = _setting(
        "uniform",
        "`uniform`, from the first frame to the last; or `qwen2_vl` or `qwen3_vl`, as the own processor of Qwen2-VL "
        "(an even number of frames) or Qwen3-VL does it: 4 to 768 frames where `fps` says how many, and `num_frames` "
        "counts where `fps` is -1 alone. The model decides where nobody says otherwise.",
    )
    max_frames: int = _setting(1024, "Refuse a request that would sample more frames than this.")
    max_pixels: int = _setting(8192 * 4320, "Refuse a video whose frames have more pixels (width x height) than this.")
    max_output_mib: int = _setting(2048, "Refuse a request whose sampled RGB frames would fill more MiB than this.")
    max_source_frames: int = _setting(
        1_000_000, "Refuse a video that holds more frames than this (9 hours at 30 frames a second)."
    )
    max_decoded_frames: int = _setting(
        100_000, "Refuse a request for which one pass would decode more frames than this to reach the sampled ones."
    )
    timeout_s: float = _setting(60.0, "Refuse a video that has taken more than this many seconds of wall time.")
    threads: int = _setting(
        4, "Decoder threads for one video; damaged videos are read by one, to give the same frames every time."
    )

    def __post_init__(self) -> None:
        for name, (low, high) in _INT_RANGES.items():
            value: object = getattr(self, name)
            if name == "num_frames" and value == -1 and not isinstance(value, bool):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise VideoError(f"The video setting {name} must be a whole number, not {_shown(value)}.")
            if not low <= value <= high:
                also = "-1 or " if name == "num_frames" else ""
                raise VideoError(
                    f"The video setting {name} must be {also}between {low} and {high}, not {_shown(value)}."
                )
        if self.sampling not in SAMPLINGS:
            raise VideoError(
                f"The video setting sampling must be one of {', '.join(SAMPLINGS)}, not {_shown(self.sampling)}."
            )
        for name, most in (("fps", 1000), ("timeout_s", 3600)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise VideoError(f"The video setting {name} must be a finite number, not {_shown(value)}.")
            if not 0 < value <= most and not (name == "fps" and value == -1):
                also = "-1 or " if name == "fps" else ""
                raise VideoError(
                    f"The video setting {name} must be {also}above 0 and at most {most}, not {_shown(value)}."
                )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> VideoSettings:
        """Build settings from user input; unknown keys raise `VideoError` naming the known ones."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise VideoError(
                f"Unknown video setting {', '.join(_shown(key) for key in unknown)}; "
                f"known are {', '.join(sorted(known))}."
            )
        return cls(**values)


@dataclass(frozen=True)
class PoolLimits:
    """What all videos of one API server process may take together; `metok_vllm.contract.settings`."""

    at_once: int = 24
    """Files decoded at a time, each in a child process."""
    waiting: int = 64
    """Files that may wait; more are answered with 503."""
    memory_mib: int = 4096
    """MiB of decoded frames in use and of decoders at work."""


def too_late(timeout_s: float) -> str:
    """The sentence for a video whose time is up."""
    return f"Reading the video took longer than {timeout_s:g} s (video setting timeout_s)."


def _shown(value: object) -> str:
    """`value` for an error message: its repr, cut so that a huge input cannot fill the log."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
