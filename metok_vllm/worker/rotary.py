"""Where the tokens of a compressed video stand on several rotary axes, on the worker.

vLLM works out a prompt's positions when the request arrives. Of a compressed video only the extent is known
then, and with it the positions of all text. Which of its tokens stands where follows from its tags, and is
written when they are read, before the first step that runs them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metok_vllm.compression.ordering import true_indices
from metok_vllm.compression.pooling import Strides
from metok_vllm.compression.positions import pooled_positions
from metok_vllm.worker.requests import VideoTags


@dataclass(frozen=True)
class VideoAxes:
    """One compressed video's place on the axes time, height and width."""

    first: int  # position of its first token, on every axis
    times: torch.Tensor  # int64 [T] on the device: time of each frame, from `first` on
    height: int  # of the tower's grid
    width: int
    strides: Strides
    corners: torch.Tensor | None = None  # int64 [T] on the device: each frame's first row and column; None: 0
    text: torch.Tensor | None = None  # int64 [t] on the device: of the text inside, on every axis, from `first` on

    def positions(self, tags: VideoTags) -> torch.Tensor:
        """Of all its tokens, int64 [3, n], without waiting for the device."""
        # As in `VideoTags.frames_of`.
        frame = tags.frame.clamp(max=self.times.shape[0] - 1)
        own = pooled_positions(frame, tags.tier, self.times, self.height, self.width, self.strides)
        if self.corners is not None:
            own[1:] += self.corners[frame]
        if self.text is not None and tags.place is not None:
            own = self._with_text(own, tags.place, self.text)
        return own + self.first

    def _with_text(self, visual: torch.Tensor, place: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Positions int64 [3, n + t] of n visual tokens at `place` [n], and of the text between them."""
        rows = visual.new_empty(visual.shape[0], visual.shape[1] + text.shape[0])
        is_text = torch.ones(rows.shape[1], dtype=torch.bool, device=rows.device).index_fill_(0, place, False)
        rows.index_copy_(1, place, visual)
        rows.index_copy_(1, true_indices(is_text, text.shape[0]), text.expand(rows.shape[0], -1))
        return rows
