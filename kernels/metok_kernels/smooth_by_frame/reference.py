"""The definition of smoothing: one frame after the other."""

from __future__ import annotations

import torch


def reference(scores: torch.Tensor, frame: torch.Tensor, frames: int, weight: float) -> torch.Tensor:
    """Same arguments and result as `smooth_by_frame`. Reads on the host."""
    smooth = scores.clone()
    for number in range(frames):
        own = frame == number
        if own.any():
            smooth[own] = (1 - weight) * scores[own] + weight * scores[own].mean()
    return smooth
