"""What the labelled family has around and beside its frames: data that the engine and the oracle share."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.oracle import Labels

LEVELS = 2
"""Layers behind which extra channels are added."""

_LENGTHS = ((2, 1), (0, 0), (3, 0), (0, 2), (1, 4), (0, 0), (5, 1))
"""Text tokens before and behind a frame, over and over: no two neighbours are alike, and some have none."""


def frame_ids(frame: int, frames: int) -> tuple[list[int], list[int]]:
    """Token ids before and behind a frame's visual tokens: ordinary words, other ones in a longer video."""
    before, behind = _LENGTHS[frame % len(_LENGTHS)]
    ids = [20 + (17 * frame + 31 * place + frames) % 200 for place in range(before + behind)]
    return ids[:before], ids[before:]


def extra_channels(features: Tensor) -> Tensor:
    """A fixed linear function of the tower's features: [..., D] to [..., LEVELS * D].

    Each level weighs the channels by itself, so that it changes what resembles what.
    """
    weights = torch.linspace(-0.6, 0.9, features.shape[-1], dtype=features.dtype, device=features.device)
    return torch.cat([features * weights, features.roll(1, -1) * weights.flip(0).square()], dim=-1)


LABELS = Labels(frame_ids, extra_channels)
