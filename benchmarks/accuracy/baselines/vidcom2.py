"""VidCom2: frames that stand out get more tokens,
and in each the tokens that stand out stay (arXiv 2505.14454).

A token is the less needed the nearer it is to the mean of the whole video and to the mean of its frame;
nearness is a sum of Gaussian kernels of several widths between unit vectors, in the half of the channels that
varies least. A frame's share of the budget grows with a sharp softmax over how far its tokens are from the
video's mean on average.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.accuracy.method import Entering, PaperBudget, Positions, subset
from benchmarks.accuracy.video import Asked, Video

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
TEMPERATURE = 0.01
CHANNELS = 0.5


def nearness(tokens: Tensor, centre: Tensor) -> Tensor:
    """Sum of Gaussian kernels: `tokens` [T, N, C] and a centre that broadcasts, to [T, N]."""
    squared = (tokens - centre).square().sum(-1)
    return torch.stack([torch.exp(-squared / (2 * width)) for width in WIDTHS]).sum(0)


def redundancy(pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Of every token (higher: dropped first) and the distinctness of every frame:
    `pooled` [T, N, D] to [T, N] and [T].
    """
    flat = pooled.flatten(0, 1)
    quiet = flat.var(0, unbiased=False).argsort(stable=True)[: max(1, int(flat.shape[1] * CHANNELS))]
    unit = torch.nn.functional.normalize(pooled[..., quiet], dim=-1)
    to_video = nearness(unit, unit.mean((0, 1)))
    return to_video + nearness(unit, unit.mean(1, keepdim=True)), -to_video.mean(1)


def allot(distinctness: Tensor, tokens: int, total: int) -> list[int]:
    """Tokens of each frame, from 1 to `tokens`, near to `total` together."""
    share = torch.softmax(distinctness / TEMPERATURE, 0)
    wanted = total / len(distinctness) * (1 + share - share.mean())
    counts: list[int] = wanted.round().long().clamp(1, tokens).tolist()
    return counts


@dataclass(frozen=True)
class VidCom2:
    """`budget` says how many tokens are left; never fewer than one a frame."""

    budget: PaperBudget
    positions: Positions = "kept"
    per_question: bool = False

    def enter(self, video: Video, asked: Asked) -> Entering:
        pooled = video.pooled()
        frames, each = pooled.shape[:2]
        total = min(max(self.budget(frames) - 1, frames), frames * each)
        redundant, distinct = redundancy(pooled)
        rank = redundant.argsort(dim=1, stable=True).argsort(1)  # 0: the frame's most distinctive token
        chosen = rank < torch.tensor(allot(distinct, each, total))[:, None]
        # Rounding leaves some tokens too many or too few: the whole video's least or most distinctive settle
        # it.
        order = torch.where(chosen, redundant - redundant.max() - 1, redundant).flatten().argsort(stable=True)
        return subset(video, pooled.flatten(0, 1), order[:total].sort().values, self.positions)
