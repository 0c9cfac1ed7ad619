"""Fewer frames: the stock model on an even sample of the frames, the lever that every user has today."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.accuracy.method import Entering, PaperBudget, subset
from benchmarks.accuracy.video import Asked, Video


@dataclass(frozen=True)
class FewerFrames:
    """An even sample of at most `count` frames, or of as many as come nearest to a budget of tokens."""

    count: int | None = None
    budget: PaperBudget | None = None
    per_question: bool = False

    def frames(self, video: Video) -> list[int]:
        """Numbers of the frames taken, as vLLM's loader samples them (first and last included)."""
        total, each = len(video), video.pooled().shape[1]
        count = self.count
        if count is None:
            assert self.budget is not None
            count = max(1, round((self.budget(total) - 1) / each))
        return [int(i) for i in np.linspace(0, total - 1, min(count, total), dtype=int)]

    def enter(self, video: Video, asked: Asked) -> Entering:
        tokens = video.pooled()[self.frames(video)].flatten(0, 1)
        return subset(video, tokens)
