"""Uniform coarser pooling: every frame with the same stride, whatever it shows.

Stride 2 is the stock model.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.accuracy.method import Entering, subset
from benchmarks.accuracy.video import STOCK_STRIDE, Asked, Video


@dataclass(frozen=True)
class UniformPooling:
    """All frames pooled with `stride`, relative to the tower's grid."""

    stride: int = STOCK_STRIDE
    per_question: bool = False

    def enter(self, video: Video, asked: Asked) -> Entering:
        tokens = video.pooled(self.stride).flatten(0, 1)
        return subset(video, tokens)
