"""Where the tokens of a compressed video stand on several rotary axes, on the worker.

vLLM works out a prompt's positions when the request arrives. Of a compressed video only the extent is known
then, and with it the positions of all text. Its visual tokens get theirs when its tags are read, before the
first step that runs them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metok_vllm.compression.pooling import Strides
from metok_vllm.compression.positions import pooled_positions
from metok_vllm.worker.requests import VideoTags


@dataclass(frozen=True)
class VideoAxes:
    """One compressed video's place on the axes time, height and width."""

    first: int  # position of its first token, on every axis
    times: torch.Tensor  # int64 [T] on the device: time of each frame, 0 for the first
    height: int  # of the tower's grid
    width: int
    strides: Strides

    def positions(self, tags: VideoTags) -> torch.Tensor:
        """Of its visual tokens, int64 [3, n], without waiting for the device."""
        own = pooled_positions(tags.frame, tags.tier, self.times, self.height, self.width, self.strides)
        return own + self.first
