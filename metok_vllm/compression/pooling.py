"""Pooling a video by tiers, in time order, with event separators (docs/method.md sections 1.5, 1.6 and 4).

All sizes come from the `TierQuota`, so the whole of `pool_video` is enqueued without waiting for the GPU.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .tiers import TierQuota, TokensPerFrame, video_tokens

PoolMode = Literal["bilinear", "average"]
"""How a model pools a frame's grid: "bilinear" for LLaVA-OneVision, "average" for LongVA."""

Strides = tuple[int, int, int]
"""Pooling stride of tier 0, 1 and 2, relative to the vision tower's grid."""

FRAMES_PER_BLOCK = 64
"""Frames pooled at once: bounds the copies made beside the output to a small share of a long video."""


class PooledVideo(NamedTuple):
    """A video's tokens after stage 1, in time order, and where each one comes from."""

    tokens: Tensor  # [total, D], type of the features
    token_event: Tensor  # int64 [total], event of each token
    token_frame: Tensor  # int64 [total]; a separator belongs to the last frame of its event


def pooled_grid(height: int, width: int, stride: int, mode: PoolMode) -> tuple[int, int]:
    """Rows and columns of a frame after pooling: rounded up for "bilinear", down (at least 1) for "average".

    Raises:
        ValueError: a size or the stride is below 1, or the mode is unknown.
    """
    if min(height, width, stride) < 1:
        raise ValueError(f"a grid and a stride are at least 1, not {height} x {width} and {stride}")
    if mode == "bilinear":
        return -(-height // stride), -(-width // stride)
    if mode == "average":
        return max(height // stride, 1), max(width // stride, 1)
    raise ValueError(f"unknown pooling mode {mode!r}: it is 'bilinear' or 'average'")


def tokens_per_frame(height: int, width: int, strides: Strides, mode: PoolMode) -> TokensPerFrame:
    """`t(s)` of docs/method.md section 4 for each tier: tokens of one frame of `height x width`."""
    grids = [pooled_grid(height, width, stride, mode) for stride in strides]
    first, second, third = (rows * columns for rows, columns in grids)
    return first, second, third


def pool_frames(features: Tensor, stride: int, mode: PoolMode) -> Tensor:
    """Pool every frame's grid: `features[n, H, W, D]` to `[n, h * w, D]` with `h, w = pooled_grid(...)`."""
    frames, height, width, channels = features.shape
    grid = pooled_grid(height, width, stride, mode)
    if grid == (height, width):
        return features.reshape(frames, height * width, channels)
    image = features.permute(0, 3, 1, 2)
    if mode == "bilinear":
        pooled = F.interpolate(image, size=grid, mode="bilinear")
    else:
        # A side shorter than the stride is averaged whole.
        pooled = F.avg_pool2d(image, kernel_size=(min(stride, height), min(stride, width)), stride=stride)
    return pooled.permute(0, 2, 3, 1).reshape(frames, -1, channels)


class VideoLayout(NamedTuple):
    """Where everything goes in a video's tokens.

    Sizes are known on the host, the rest stays on the device.
    """

    total: int
    starts: Tensor  # int64 [T], row of each frame's first token
    separators: Tensor  # int64 [events], row of each separator; meaningless where the model has none
    token_frame: Tensor  # int64 [total], frame of each row


def lay_out(
    tiers: Tensor, per_frame: TokensPerFrame, quota: TierQuota, separators: bool, event_ids: Tensor
) -> VideoLayout:
    """Lay out a video's tokens in time order, a separator behind each event's last frame.

    Args:
        tiers: int64 [T], with exactly the quota's counts.
        per_frame: tokens of a frame of each tier.
        quota: the counts.
        separators: whether the model has them.
        event_ids: int64 [T], never decreasing.
    """
    total = video_tokens(quota, per_frame, separators)
    device = tiers.device
    last_frame = torch.searchsorted(event_ids, torch.arange(quota.events, device=device), right=True) - 1
    lengths = torch.where(tiers == 0, per_frame[0], torch.where(tiers == 1, per_frame[1], per_frame[2]))
    if separators:
        lengths = lengths.index_add(0, last_frame, torch.ones_like(last_frame))
    ends = lengths.cumsum(0)
    token_frame = torch.searchsorted(ends, torch.arange(total, device=device), right=True)
    return VideoLayout(total, ends - lengths, ends[last_frame] - 1, token_frame)


def pool_video(
    features: Tensor,
    tiers: Tensor,
    strides: Strides,
    quota: TierQuota,
    mode: PoolMode,
    separator: Tensor | None,
    event_ids: Tensor,
) -> PooledVideo:
    """Pool each frame with the stride of its tier; tokens come out in time order.

    Args:
        features: [T, H, W, D], what the vision tower and projector give.
        tiers: int64 [T] in {0, 1, 2}; must hold exactly the quota's counts (`tiers.assign` does). This is
            not checked: looking would wait for the GPU.
        strides: pooling stride of each tier.
        quota: counts the output is laid out by.
        mode: the model's own pooling.
        separator: [D], placed after the last token of every event, or None where the model has none.
        event_ids: int64 [T], never decreasing, with every one of `quota.events` present (`events.segment`).

    Returns:
        `video_tokens(...)` rows; see `PooledVideo`.

    Raises:
        ValueError: the shapes and the quota disagree on the number of frames.
    """
    frames, height, width, channels = features.shape
    if not frames == quota.frames == tiers.shape[0] == event_ids.shape[0]:
        raise ValueError(
            f"{frames} frames of features, {tiers.shape[0]} tiers and {event_ids.shape[0]} event ids do not "
            f"fit a quota of {quota.frames} frames"
        )
    per_frame = tokens_per_frame(height, width, strides, mode)
    layout = lay_out(tiers, per_frame, quota, separator is not None, event_ids)
    device = features.device

    tokens = torch.empty(layout.total, channels, dtype=features.dtype, device=device)
    by_tier = torch.argsort(tiers, stable=True)
    end = 0
    for frames_in_tier, stride, count in zip(quota.counts(), strides, per_frame, strict=True):
        begin, end = end, end + frames_in_tier
        offsets = torch.arange(count, device=device)
        for at in range(begin, end, FRAMES_PER_BLOCK):
            block = by_tier[at : min(at + FRAMES_PER_BLOCK, end)]
            rows = (layout.starts[block][:, None] + offsets).flatten()
            tokens.index_copy_(0, rows, pool_frames(features[block], stride, mode).flatten(0, 1))
    if separator is not None:
        tokens.index_copy_(0, layout.separators, separator.to(tokens.dtype).expand(quota.events, channels))
    return PooledVideo(tokens, event_ids[layout.token_frame], layout.token_frame)
