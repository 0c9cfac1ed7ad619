"""Rotary positions with three axes (M-RoPE) of a video's tokens after stage 1 (docs/method.md section 2.4).

A pooled token stands where the centre of its window stood among the tower's tokens. Which tier a frame is in
is known on the device alone, so everything here is computed there, without waiting for it.
"""

import torch
from torch import Tensor

from .pooling import Strides, by_tier, pooled_grid


def pooled_positions(frame: Tensor, tier: Tensor, times: Tensor, height: int, width: int, strides: Strides) -> Tensor:
    """Time, row and column of each visual token, int64 [3, n], from the video's first position on.

    A frame's tokens stand row after row, without separators. The window of a token covers `stride` rows and
    columns, at the lower and the right edge only those that there are. Its centre is rounded down.

    Args:
        frame: int64 [n], frame of each token, never decreasing.
        tier: int64 [n], tier of each token's frame.
        times: int64 [T], position of each frame on the first axis.
        height: rows of the tower's grid.
        width: its columns.
        strides: of the tiers.
    """
    tokens = torch.arange(frame.shape[0], device=frame.device)
    place = tokens - torch.searchsorted(frame, frame)  # among the tokens of its frame
    stride = by_tier(tier, strides)
    columns = by_tier(tier, [pooled_grid(height, width, one)[1] for one in strides])
    row = torch.div(place, columns, rounding_mode="floor")
    centres = [
        start + torch.div(torch.minimum(stride, size - start) - 1, 2, rounding_mode="floor")
        for start, size in ((row * stride, height), ((place - row * columns) * stride, width))
    ]
    return torch.stack([times[frame], *centres])
