"""Qwen3-VL for the oracle: its tower with what it adds to deeper layers, text around frames, positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.oracle.labelled import Labels
from tests.support.oracle.qwen import centres
from tests.support.oracle.stage1 import Layout


@dataclass(frozen=True)
class Pixels:
    """One video as the HF processor gives it."""

    patches: Tensor  # [pairs * rows * columns, channels]
    grid: Tensor  # int64 [1, 3]: pairs, rows and columns of patches
    text: list[tuple[list[int], list[int]]]  # token ids before and behind each pair's visual tokens


def grid_of(model: Any, pixels: Pixels, tokens: Tensor) -> Tensor:
    """Tokens [T * H * W, D], one for each 2 x 2 patches of a pair, as [T, H, W, D]."""
    pairs, rows, columns = pixels.grid[0].tolist()
    merge = model.config.vision_config.spatial_merge_size
    return tokens.reshape(pairs, rows // merge, columns // merge, -1)


def tower(model: Any, pixels: Pixels) -> Tensor:
    """V[T, H, W, D] of T pairs of frames."""
    return grid_of(model, pixels, model.model.get_video_features(pixels.patches, pixels.grid).pooler_output[0])


def labels(model: Any, pixels: Pixels) -> Labels:
    """The text around the video's pairs, and what the tower adds behind the first layers."""
    levels = model.model.get_video_features(pixels.patches, pixels.grid).deepstack_features
    extra = torch.cat([grid_of(model, pixels, level[0]) for level in levels], dim=-1)
    return Labels(text=lambda frame, frames: pixels.text[frame], extra=lambda features: extra)


def pictures(model: Any, pixels: Tensor, grids: Tensor) -> list[Tensor]:
    """Tokens [n, (1 + levels) * D] of each picture."""
    given = model.model.get_image_features(pixels, grids)
    return [torch.cat(parts, dim=1) for parts in zip(given.pooler_output, *given.deepstack_features, strict=True)]


def rotary(
    model: Any, ids: list[int], videos: list[Pixels], images: tuple[Tensor, Tensor] | None, strides: list[list[int]]
) -> tuple[Tensor, int]:
    """Positions [3, tokens] of a prompt whose placeholders are written out, and the first one behind it.

    Each pair of frames is a picture of its own among the text: a visual token stands where the centre of its
    window stands in the unpruned pair, and text behind it one behind the largest position of that.
    """
    config = model.config
    merge = config.vision_config.spatial_merge_size
    films, stills = iter(zip(videos, strides, strict=True)), iter([] if images is None else images[1].tolist())
    columns: list[tuple[int, int, int]] = []
    upcoming = 0
    while len(columns) < len(ids):
        token = ids[len(columns)]
        if token == config.video_token_id:
            pixels, steps = next(films)
            size, text = pixels.grid[0].tolist(), pixels.text
        elif token == config.image_token_id:
            size, steps, text = next(stills), [1], [([], [])]
        else:
            columns.append((upcoming,) * 3)
            upcoming += 1
            continue
        height, width = size[1] // merge, size[2] // merge
        for (before, behind), stride in zip(text, steps, strict=True):
            columns += [(upcoming + i,) * 3 for i in range(len(before))]
            upcoming += len(before)
            columns += [
                (upcoming, upcoming + row, upcoming + column)
                for row in centres(height, stride)
                for column in centres(width, stride)
            ]
            upcoming += max(height, width)
            columns += [(upcoming + i,) * 3 for i in range(len(behind))]
            upcoming += len(behind)
    return torch.tensor(columns).T, upcoming


LAYOUT = Layout("average", "none", plain=1, tower=tower, rotary=rotary, labels=labels, encode_pictures=pictures)
