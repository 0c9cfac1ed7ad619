"""Checks and launch of `smooth_by_frame`."""

from __future__ import annotations

import torch

from metok_kernels.checks import INDEX, expect, require
from metok_kernels.launch import Launch
from metok_kernels.smooth_by_frame.kernel import smooth_kernel

BLOCK = 256
"""Tokens that one program takes at a time: most frames have no more."""


def prepare(scores: torch.Tensor, starts: torch.Tensor, weight: float) -> tuple[Launch, torch.Tensor]:
    """Check the arguments; returns the launch and what it fills.

    Args:
        scores: float32 [tokens].
        starts: int [frames + 1], ascending: where each frame's tokens start, and where the last one's end.
        weight: from 0 to 1.
    """
    device = scores.device
    expect("scores", scores, (None,), (torch.float32,), device)
    expect("starts", starts, (None,), INDEX, device)
    require(starts.shape[0] >= 1, "starts must have an entry more than there are frames")
    require(0 <= weight <= 1, f"the weight must be from 0 to 1, not {weight}")
    out = torch.empty_like(scores)
    launch = Launch(
        smooth_kernel,
        (starts.shape[0] - 1, 1, 1),
        {"p_score": scores, "p_start": starts, "p_out": out, "weight": float(weight)},
        {"BLOCK": BLOCK},
    )
    return launch, out


def smooth_by_frame(scores: torch.Tensor, frame: torch.Tensor, frames: int, weight: float) -> torch.Tensor:
    """`(1 - weight) * a_n + weight * mean of a over its frame's tokens` (docs/method.md section 4.6).

    Args:
        scores: [tokens] float32, of one video's tokens alive, frame after frame.
        frame: [tokens] int, of each token; never decreasing, from 0 to `frames - 1`. A frame may have none.
        frames: of the video.
        weight: from 0, which changes nothing, to 1, which leaves the means alone.

    Returns:
        [tokens] float32. A score that is not a number makes those of its frame so.

    Raises TypeError or ValueError for wrong dtypes, shapes or devices. Nothing is read from the device.
    Cost: reads 12 bytes a token and writes 4, and a binary search a frame. 4 FLOPs a token.
    """
    expect("frame", frame, (scores.shape[0],), INDEX, scores.device)
    bounds = torch.arange(frames + 1, dtype=frame.dtype, device=frame.device)
    launch, out = prepare(scores, torch.searchsorted(frame, bounds), weight)
    launch.run()
    return out
