"""Random tokens: the control that any choice of tokens must beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from benchmarks.accuracy.method import Entering, PaperBudget, Positions, subset
from benchmarks.accuracy.video import Asked, Video


@dataclass(frozen=True)
class RandomTokens:
    """Tokens of the stock video, drawn evenly without looking;
    the same ones for every question about the video.
    """

    budget: PaperBudget
    positions: Positions = "kept"
    per_question: bool = False

    def enter(self, video: Video, asked: Asked) -> Entering:
        tokens = video.pooled().flatten(0, 1)
        count = min(self.budget(len(video)) - 1, len(tokens))
        generator = torch.Generator().manual_seed(zlib.crc32(video.name.encode()))
        index = torch.randperm(len(tokens), generator=generator)[:count].sort().values
        return subset(video, tokens, index, self.positions)
