"""EVS, efficient video sampling: drop the patches that look as they did one frame before (arXiv 2510.14624).

The whole first frame is kept. Every later patch is measured against the same place one frame earlier, and
over the whole video those that changed most are kept, at their own positions. The paper measures in pixels;
vLLM's implementation measures the cosine of the tokens. Both are here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy.method import Entering, PaperBudget, Positions, subset
from benchmarks.accuracy.video import Asked, Video
from metok_vllm.compression.cosine import cosine


@dataclass(frozen=True)
class EfficientVideoSampling:
    """`budget` says how many tokens are left; never fewer than the first frame has."""

    budget: PaperBudget
    space: Literal["pixels", "tokens"] = "pixels"
    positions: Positions = "kept"
    per_question: bool = False

    def change(self, video: Video) -> Tensor:
        """How much each token's place changed since the frame before, float32 [T - 1, tokens of a frame]."""
        pooled = video.pooled()
        if self.space == "tokens":
            return 1 - cosine(pooled[1:], pooled[:-1])
        side = round(pooled.shape[1] ** 0.5)
        pixels = torch.from_numpy(video.frames).permute(0, 3, 1, 2).float()
        return F.adaptive_avg_pool2d((pixels[1:] - pixels[:-1]).abs().mean(1), side).flatten(1)

    def enter(self, video: Video, asked: Asked) -> Entering:
        tokens = video.pooled().flatten(0, 1)
        first = video.pooled().shape[1]
        wanted = max(self.budget(len(video)) - 1, first) - first
        order = torch.argsort(self.change(video).flatten(), descending=True, stable=True)
        index = torch.cat([torch.arange(first), first + order[:wanted].sort().values])
        return subset(video, tokens, index, self.positions)
