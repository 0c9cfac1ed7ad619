"""The definition of tiered pooling: torch.nn.functional, one frame at a time, in float32."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Mode = Literal["average", "bilinear"]


def pooled_grid(height: int, width: int, stride: int) -> tuple[int, int]:
    """Rows and columns of tokens that a `height x width` grid becomes at `stride`: ceil of both."""
    return -(-height // stride), -(-width // stride)


def _pool(frame: torch.Tensor, stride: int, mode: Mode) -> torch.Tensor:
    """[height, width, D] -> [rows, columns, D], float32."""
    height, width = frame.shape[:2]
    grid = frame.float().permute(2, 0, 1)[None]
    if mode == "bilinear":
        grid = F.interpolate(grid, size=pooled_grid(height, width, stride), mode="bilinear")
    else:
        grid = F.avg_pool2d(grid, stride, ceil_mode=True, count_include_pad=False)
    return grid[0].permute(1, 2, 0)


def reference(
    frames: torch.Tensor,
    stride: torch.Tensor,
    offset: torch.Tensor,
    *,
    mode: Mode,
    total: int,
    min_stride: int = 1,
    row_gap: bool = False,
    separator: torch.Tensor | None = None,
    separator_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same arguments and result as `tiered_pool`; `min_stride` is not used. Rows nobody fills are zero."""
    out = torch.zeros(total, frames.shape[3], dtype=frames.dtype, device=frames.device)
    for frame, (s, start) in enumerate(zip(stride.tolist(), offset.tolist(), strict=True)):
        for row in _pool(frames[frame], s, mode):
            out[start : start + row.shape[0]] = row.to(frames.dtype)
            start += row.shape[0] + row_gap
    if separator is not None and separator_offset is not None:
        out[separator_offset.long()] = separator
    return out
