"""What a request may say of its videos to Qwen's processor, and what a video must say of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metok_vllm.contract.refusals import refusal

ALLOWED = ("fps", "num_frames", "size")

_EDGES = ("shortest_edge", "longest_edge")
_WHERE = "METok (mm_processor_kwargs)"


def check_stated(kwargs: Mapping[str, object], size: Any) -> None:
    """Refuse values of `ALLOWED` that Qwen's processor would fail on, or that would take more memory than the
    server has been started for.

    Args:
        kwargs: what the request states, keys of `ALLOWED` alone.
        size: the server's own, with `shortest_edge` and `longest_edge`: the fewest and the most pixels of a
            frame.

    Raises:
        ValueError: in one sentence.
    """
    for name in ("fps", "num_frames"):
        value = kwargs.get(name)
        if value is not None and not (_is_number(value, whole=name == "num_frames") and 0 < value <= 1_000_000):  # type: ignore[operator]
            kind = "whole number" if name == "num_frames" else "number"
            raise ValueError(f"{_WHERE}: '{name}' takes a {kind} above 0, not {value!r:.40}.")
    stated = kwargs.get("size")
    if stated is None:
        return
    if not isinstance(stated, Mapping) or set(stated) - set(_EDGES) or not all(map(_is_whole, stated.values())):
        raise ValueError(
            f"{_WHERE}: 'size' takes whole numbers of pixels as 'shortest_edge' and 'longest_edge', not {stated!r:.60}."
        )
    least, most = (int(stated.get(edge, size[edge])) for edge in _EDGES)
    if not 1 <= least <= most <= int(size["longest_edge"]):
        raise ValueError(
            f"{_WHERE}: 'size' takes a 'shortest_edge' of 1 or more and a 'longest_edge' from that to this server's "
            f"{int(size['longest_edge'])}, not {least} and {most}."
        )


def _is_whole(value: object) -> bool:
    return _is_number(value, whole=True)


def _is_number(value: object, whole: bool) -> bool:
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)


def check_timed(videos: Any, stated: Mapping[str, Any], limits: tuple[int, int]) -> None:
    """Refuse a video whose frames cannot be labelled by their times, as Qwen3-VL's are.

    Args:
        videos: the request's, as vLLM has parsed them; items without data are left to the caches.
        stated: what the request states, keys of `ALLOWED` alone.
        limits: fewest and most frames that Qwen3-VL's own processor samples.

    Raises:
        ValueError: in one sentence.
    """
    check_metadata(videos)
    for index in range(len(videos) if videos is not None else 0):
        item = videos.get(index)
        if not isinstance(item, tuple):
            continue
        frames, metadata = item
        for name in ("fps", "total_num_frames", "frames_indices"):
            if metadata.get(name) is None:
                raise refusal(
                    "video", f"METok: this model reads when a video's frames are, and this one has no {name}."
                )
        if len(frames) < 2:
            raise refusal("video", f"METok: this model takes videos of 2 frames or more, not of {len(frames)}.")
        if not metadata.get("do_sample_frames"):
            continue
        total, wanted = metadata["total_num_frames"], stated.get("num_frames")
        if total != len(frames):
            raise refusal(
                "video", f"METok: of a video of {total} frames {len(frames)} are there, so none can be sampled from it."
            )
        least, most = limits[0], min(limits[1], total)
        if wanted is not None and not least <= wanted <= most:
            raise refusal(
                "setting",
                f"{_WHERE}: 'num_frames' takes from {least} to {most} frames of a video of {total}, not {wanted}.",
            )


def check_metadata(videos: Any) -> None:
    """Refuse a video whose frame rate nobody knows. Items without data are left to the caches.

    Raises:
        ValueError: in one sentence.
    """
    for index in range(len(videos) if videos is not None else 0):
        item = videos.get(index)
        if not isinstance(item, tuple):
            continue
        frames, metadata = item
        rate, total = metadata.get("fps"), metadata.get("total_num_frames")
        if rate is not None and not (_is_number(rate, whole=False) and 0 < rate <= 1_000_000):
            raise refusal("video", "METok: this model must know a video's frame rate, and this one does not tell it.")
        indices = metadata.get("frames_indices")
        if total is not None and not (_is_whole(total) and total > 0):
            raise refusal(
                "video", f"METok: a video of {total!r:.40} frames (total_num_frames) cannot be placed in time."
            )
        # transformers writes the last one twice into the list that it is given, where their number is odd.
        if indices is not None and len(indices) not in (len(frames), len(frames) + len(frames) % 2):
            raise refusal(
                "video", f"METok: a video has {len(frames)} frames and {len(indices)} frames_indices in its metadata."
            )
