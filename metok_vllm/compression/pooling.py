"""Pooling a video by tiers, in time order, with separators (docs/method.md sections 1.5, 1.6 and 4).

All sizes come from the `TierQuota`, so the whole of `pool_video` is enqueued without waiting for the GPU.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .ordering import true_indices
from .tiers import TierQuota, TokensPerFrame, video_tokens

PoolMode = Literal["bilinear", "average"]
"""How a model pools a frame's grid, its sides rounded up. "average": over the tokens that a window has."""

Separators = Literal["event", "row", "none"]
"""What one more token follows: each event, each row of a pooled frame, or nothing."""


class PoolStyle(NamedTuple):
    """How a model lays out a video."""

    mode: PoolMode
    separators: Separators = "event"


Strides = tuple[int, int, int]
"""Pooling stride of tier 0, 1 and 2, relative to the vision tower's grid."""

FRAMES_PER_BLOCK = 64
"""Frames pooled at once: bounds the copies made beside the output to a small share of a long video."""


class PooledVideo(NamedTuple):
    """A video's tokens after stage 1, in time order, and where each one comes from."""

    tokens: Tensor  # [total, D], type of the features
    token_event: Tensor  # int64 [total], event of each token
    token_frame: Tensor  # int64 [total]; a separator belongs to the frame before it


def pooled_grid(height: int, width: int, stride: int) -> tuple[int, int]:
    """Rows and columns of a frame after pooling, rounded up.

    Raises:
        ValueError: a size or the stride is below 1.
    """
    if min(height, width, stride) < 1:
        raise ValueError(f"a grid and a stride are at least 1, not {height} x {width} and {stride}")
    return -(-height // stride), -(-width // stride)


def tokens_per_frame(height: int, width: int, strides: Strides, style: PoolStyle) -> TokensPerFrame:
    """`t(s)` of docs/method.md section 4 for each tier: tokens of one frame of `height x width`."""
    more = int(style.separators == "row")
    grids = [pooled_grid(height, width, stride) for stride in strides]
    first, second, third = (rows * (columns + more) for rows, columns in grids)
    return first, second, third


def pool_frames(features: Tensor, stride: int, mode: PoolMode) -> Tensor:
    """Pool every frame's grid: `features[n, H, W, D]` to `[n, h * w, D]` with `h, w = pooled_grid(...)`.

    Raises:
        ValueError: the mode is unknown.
    """
    if mode not in get_args(PoolMode):
        raise ValueError(f"unknown pooling mode {mode!r}: it is 'bilinear' or 'average'")
    frames, height, width, channels = features.shape
    grid = pooled_grid(height, width, stride)
    if grid == (height, width):
        return features.reshape(frames, height * width, channels)
    image = features.permute(0, 3, 1, 2)
    if mode == "bilinear":
        pooled = F.interpolate(image, size=grid, mode="bilinear")
    else:
        pooled = F.avg_pool2d(image, stride, ceil_mode=True, count_include_pad=False)
    return pooled.permute(0, 2, 3, 1).reshape(frames, -1, channels)


class VideoLayout(NamedTuple):
    """Where everything goes in a video's tokens.

    Sizes are known on the host, the rest stays on the device.
    """

    total: int
    starts: Tensor  # int64 [T], row of each frame's first token
    separators: Tensor  # int64 [n], row of each separator
    token_frame: Tensor  # int64 [total], frame of each row


def lay_out(
    tiers: Tensor, grids: Sequence[tuple[int, int]], quota: TierQuota, separators: Separators, event_ids: Tensor
) -> VideoLayout:
    """Lay out a video's tokens in time order, a separator behind each event's last frame, or behind each row.

    Args:
        tiers: int64 [T], with exactly the quota's counts.
        grids: rows and columns of a frame of each tier.
        quota: the counts.
        separators: where the model has them.
        event_ids: int64 [T], never decreasing.
    """
    row = int(separators == "row")
    first, second, third = (height * (width + row) for height, width in grids)
    total = video_tokens(quota, (first, second, third), separators == "event")
    device = tiers.device
    lengths = by_tier(tiers, (first, second, third))
    last_frame = torch.empty(0, dtype=torch.int64, device=device)
    if separators == "event":
        last_frame = torch.searchsorted(event_ids, torch.arange(quota.events, device=device), right=True) - 1
        lengths = lengths.index_add(0, last_frame, torch.ones_like(last_frame))
    ends = lengths.cumsum(0)
    starts = ends - lengths
    token_frame = torch.searchsorted(ends, torch.arange(total, device=device), right=True)
    rows = ends[last_frame] - 1
    if separators == "row":
        width = by_tier(tiers, [columns for _, columns in grids])[token_frame] + 1
        place = torch.arange(total, device=device) - starts[token_frame]
        count = sum(frames * height for frames, (height, _) in zip(quota.counts(), grids, strict=True))
        rows = true_indices(place % width == width - 1, count)
    return VideoLayout(total, starts, rows, token_frame)


def by_tier(tiers: Tensor, values: Sequence[int]) -> Tensor:
    """Of each frame the value of its tier: int64 [T] in {0, 1, 2} to int64 [T]."""
    return torch.where(tiers == 0, values[0], torch.where(tiers == 1, values[1], values[2]))


def pool_video(
    features: Tensor,
    tiers: Tensor,
    strides: Strides,
    quota: TierQuota,
    style: PoolStyle,
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
        style: the model's own.
        separator: [D]; None where the style has none.
        event_ids: int64 [T], never decreasing, with every one of `quota.events` present (`events.segment`).

    Returns:
        `video_tokens(...)` rows; see `PooledVideo`.

    Raises:
        ValueError: the shapes and the quota disagree on the number of frames; or there is no separator where
            the model has them, or one where it has none.
    """
    frames, height, width, channels = features.shape
    check_video(frames, tiers, quota, style, separator, event_ids)
    grids = [pooled_grid(height, width, stride) for stride in strides]
    layout = lay_out(tiers, grids, quota, style.separators, event_ids)
    device = features.device

    tokens = torch.empty(layout.total, channels, dtype=features.dtype, device=device)
    order = torch.argsort(tiers, stable=True)
    end = 0
    for frames_in_tier, stride, (rows, columns) in zip(quota.counts(), strides, grids, strict=True):
        begin, end = end, end + frames_in_tier
        offsets = torch.arange(rows * columns, device=device)
        if style.separators == "row":
            offsets += offsets // columns
        for at in range(begin, end, FRAMES_PER_BLOCK):
            block = order[at : min(at + FRAMES_PER_BLOCK, end)]
            places = (layout.starts[block][:, None] + offsets).flatten()
            tokens.index_copy_(0, places, pool_frames(features[block], stride, style.mode).flatten(0, 1))
    if separator is not None:
        count = layout.separators.shape[0]
        tokens.index_copy_(0, layout.separators, separator.to(tokens.dtype).expand(count, channels))
    return PooledVideo(tokens, event_ids[layout.token_frame], layout.token_frame)


def check_video(
    frames: int, tiers: Tensor, quota: TierQuota, style: PoolStyle, separator: Tensor | None, event_ids: Tensor
) -> None:
    """Raise the errors of `pool_video`."""
    if not frames == quota.frames == tiers.shape[0] == event_ids.shape[0]:
        raise ValueError(
            f"{frames} frames of features, {tiers.shape[0]} tiers and {event_ids.shape[0]} event ids do not "
            f"fit a quota of {quota.frames} frames"
        )
    if (style.separators == "none") != (separator is None):
        there = "none" if separator is None else "one"
        raise ValueError(f"the style's separators are {style.separators!r}, and {there} is given")
