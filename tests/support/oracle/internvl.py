"""InternVL3 for the oracle: its tower, the text that counts its frames, its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tests.support.oracle.labelled import Labels
from tests.support.oracle.stage1 import Layout


@dataclass(frozen=True)
class Pixels:
    """One video as the HF processor gives it."""

    frames: Tensor  # [T, 3, h, w]
    text: list[tuple[list[int], list[int]]]  # token ids before and behind each frame's visual tokens


def tower(model: Any, pixels: Pixels) -> Tensor:
    """V[T, H, W, D], a frame's tokens row by row."""
    tokens = model.model.get_image_features(pixels.frames).pooler_output
    side = round(tokens.shape[1] ** 0.5)
    return tokens.reshape(len(tokens), side, side, -1)


def labels(model: Any, pixels: Pixels) -> Labels:
    return Labels(text=lambda frame, frames: pixels.text[frame])


def pictures(model: Any, pixels: Tensor, tiles: Tensor) -> list[Tensor]:
    """Tokens [n, D] of each picture: `pixels` [tiles, 3, h, w], `tiles` of each."""
    tokens = model.model.get_image_features(pixels).pooler_output
    return [own.flatten(0, 1) for own in tokens.split(tiles.tolist())]


LAYOUT = Layout("average", "none", plain=1, tower=tower, labels=labels, encode_pictures=pictures)
