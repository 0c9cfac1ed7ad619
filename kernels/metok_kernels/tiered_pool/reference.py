"""The definition of tiered pooling: torch.nn.functional, one frame at a time, in float32."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Mode = Literal["average", "bilinear"]


def pooled_grid(height: int, width: int, stride: int, mode: Mode) -> tuple[int, int]:
    """Rows and columns of tokens that a `height x width` grid becomes at `stride`.

    Bilinear: ceil of both, as LLaVA-OneVision counts. Average: floor of both, at least 1.
    """
    if mode == "bilinear":
        return -(-height // stride), -(-width // stride)
    return max(height // stride, 1), max(width // stride, 1)


def _pool(frame: torch.Tensor, stride: int, mode: Mode) -> torch.Tensor:
    """[height, width, D] -> [tokens, D], float32."""
    height, width = frame.shape[:2]
    grid = frame.float().permute(2, 0, 1)[None]
    if mode == "bilinear":
        grid = F.interpolate(grid, size=pooled_grid(height, width, stride, mode), mode="bilinear")
    else:  # a window larger than the grid is cut to the grid
        grid = F.avg_pool2d(grid, (min(stride, height), min(stride, width)))
    return grid[0].permute(1, 2, 0).reshape(-1, frame.shape[2])


def reference(
    frames: torch.Tensor,
    stride: torch.Tensor,
    offset: torch.Tensor,
    *,
    mode: Mode,
    total: int,
    min_stride: int = 1,
    separator: torch.Tensor | None = None,
    separator_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same arguments and result as `tiered_pool`; `min_stride` is not used. Rows nobody fills are zero."""
    out = torch.zeros(total, frames.shape[3], dtype=frames.dtype, device=frames.device)
    for frame, (s, start) in enumerate(zip(stride.tolist(), offset.tolist(), strict=True)):
        tokens = _pool(frames[frame], s, mode)
        out[start : start + tokens.shape[0]] = tokens.to(frames.dtype)
    if separator is not None and separator_offset is not None:
        out[separator_offset.long()] = separator
    return out
