"""Qwen2-VL and Qwen2.5-VL for the oracle: their tower, and positions on three axes, from the method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.oracle.stage1 import Layout


@dataclass(frozen=True)
class Pixels:
    """One video as the HF processor gives it."""

    patches: Tensor  # [pairs * rows * columns, channels]
    grid: Tensor  # int64 [1, 3]: pairs, rows and columns of patches
    seconds: float | None  # between two pairs; None where the model does not read it


def tower(model: Any, pixels: Pixels) -> Tensor:
    """V[T, H, W, D] of T pairs of frames: one token for each 2 x 2 patches."""
    tokens = model.model.get_video_features(pixels.patches, pixels.grid).pooler_output[0]
    pairs, rows, columns = pixels.grid[0].tolist()
    merge = model.config.vision_config.spatial_merge_size
    return tokens.reshape(pairs, rows // merge, columns // merge, -1)


def rotary(
    model: Any, ids: list[int], videos: list[Pixels], images: tuple[Tensor, Tensor] | None, strides: list[list[int]]
) -> tuple[Tensor, int]:
    """Positions [3, tokens] of a prompt whose placeholders are written out, and the first one behind it.

    A token stands where the centre of its window stands in the unpruned video, and text behind a picture or a
    video one behind the largest position that the unpruned one has on any axis.
    """
    config = model.config
    merge, rate = config.vision_config.spatial_merge_size, getattr(config.vision_config, "tokens_per_second", None)
    films, pictures = iter(zip(videos, strides, strict=True)), iter([] if images is None else images[1].tolist())
    columns: list[tuple[int, int, int]] = []
    upcoming = 0
    while len(columns) < len(ids):
        token = ids[len(columns)]
        if token not in (config.video_token_id, config.image_token_id):
            columns.append((upcoming,) * 3)
            upcoming += 1
            continue
        if token == config.video_token_id:
            pixels, steps = next(films)
            size, seconds = pixels.grid[0].tolist(), pixels.seconds
        else:
            size, seconds = next(pictures), None
            steps = [1] * size[0]
        height, width = size[1] // merge, size[2] // merge
        scale = 1.0 if seconds is None or rate is None else seconds * rate
        times = [int(pair * scale) for pair in range(size[0])]
        for time, stride in zip(times, steps, strict=True):
            for row in centres(height, stride):
                columns += [(upcoming + time, upcoming + row, upcoming + column) for column in centres(width, stride)]
        upcoming += 1 + max(times[-1], height - 1, width - 1)
    return torch.tensor(columns).T, upcoming


def centres(size: int, stride: int) -> list[int]:
    """The middle of each window of `stride` places, the left one of two; the last window may be shorter."""
    windows = [range(start, min(start + stride, size)) for start in range(0, size, stride)]
    return [window[(len(window) - 1) // 2] for window in windows]


LAYOUT = Layout("average", "none", plain=1, tower=tower, rotary=rotary)
