"""Rotary positions with three axes: what Qwen's families share, and those of videos that are grids alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.utils.torch_utils import async_tensor_h2d

from metok_vllm.contract.fields import PLAN_FIELD
from metok_vllm.contract.video_plan import VideoPlan
from metok_vllm.worker.rotary import VideoAxes

AXES = 3
"""Time, height and width."""

Integers = NDArray[np.int64]


class Frames(NamedTuple):
    """Where the T frames of a picture or a video stand unpruned, counted from its first position."""

    times: Integers  # [T], of each frame
    corners: Integers  # [T], first row and column of each frame
    height: int  # of the tower's merged grid
    width: int
    before: Integers  # [T], text tokens before each frame, right before its corner
    behind: Integers  # [T], behind it
    extent: int  # positions that all of it takes on the longest axis; the next token stands behind them

    def text(self) -> Integers:
        """Positions of the text inside, [t]."""
        side = max(self.height, self.width)
        parts = [
            part
            for corner, before, behind in zip(self.corners, self.before, self.behind, strict=True)
            for part in (np.arange(corner - before, corner), np.arange(corner + side, corner + side + behind))
        ]
        return np.concatenate(parts)

    def positions(self) -> Integers:
        """Of all tokens, unpruned: [AXES, tokens]."""
        grid = np.indices((len(self.times), self.height, self.width)).reshape(AXES, len(self.times), -1)
        grid[0] = self.times[:, None]
        grid[1:] += self.corners[:, None]
        if not (self.before.any() or self.behind.any()):
            return grid.reshape(AXES, -1)
        text, parts, start = self.text(), list[Integers](), 0
        for frame, (before, behind) in enumerate(zip(self.before, self.behind, strict=True)):
            middle, end = start + before, start + before + behind
            parts += [_same(text[start:middle]), grid[:, frame], _same(text[middle:end])]
            start = end
        return np.concatenate(parts, axis=1)


class Place(NamedTuple):
    """One picture or video among the positions of a prompt that nobody has pruned."""

    offset: int  # of its first token in the prompt
    length: int  # its tokens in the prompt
    first: int  # its first position, on every axis
    frames: Frames
    plan: VideoPlan | None  # of a compressed video


def frame_times(frames: int, factor: float) -> Integers:
    """Position in time of each frame as stock vLLM has it: rounded down, frame by frame."""
    times: Integers = (np.arange(frames) * factor).astype(np.int64)
    return times


def grid_frames(times: Integers, height: int, width: int) -> Frames:
    """Frames whose rows and columns all start at the first position, without text."""
    none = np.zeros_like(times)
    return Frames(times, none, height, width, none, none, max(int(times[-1]) + 1, height, width))


def frames_in_text(before: Iterable[int], behind: Iterable[int], height: int, width: int) -> Frames:
    """Frames that each stand in the text as a picture does, with so much text before and behind each."""
    of_before, of_behind = (np.array([*counts], dtype=np.int64) for counts in (before, behind))
    each = of_before + max(height, width) + of_behind
    corners = each.cumsum() - each + of_before
    return Frames(corners, corners, height, width, of_before, of_behind, int(each.sum()))


class PrunedPositions:
    """Mixed in before a stock model with positions of three axes, by a class that states `frames_of_items`.

    A compressed video takes as many positions as it would untouched, so the text behind it stands where it
    would, and so does the answer.
    """

    rotary_axes = AXES

    def frames_of_items(self, features: Sequence[Any]) -> Iterator[Frames]:
        """Of each picture and video, in the order given, which is the prompt's."""
        raise NotImplementedError

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        """As stock; a compressed video's tokens all have its first position until its tags are read."""
        # Most prompts have none, and the stock model reads what it needs of those by itself.
        if not any(compressed_plan(feature) for feature in mm_features):
            stock: tuple[torch.Tensor, int] = super().get_mrope_input_positions(  # type: ignore[misc]  # a mixin
                input_tokens, mm_features
            )
            return stock
        parts: list[Integers] = []
        token = position = 0
        for place in self._places(mm_features):
            parts.append(_text(position, place.offset - token))
            if place.plan is not None:
                parts.append(np.full((AXES, place.length), place.first))
            else:
                parts.append(place.frames.positions() + place.first)
            token, position = place.offset + place.length, place.first + place.frames.extent
        behind = len(input_tokens) - token
        parts.append(_text(position, behind))
        return torch.from_numpy(np.concatenate(parts, axis=1)), position + behind - len(input_tokens)

    def video_axes(self, features: Sequence[Any], device: torch.device) -> tuple[VideoAxes, ...]:
        """The compressed videos of a prompt, in its order."""
        return tuple(
            VideoAxes(
                first=place.first,
                times=async_tensor_h2d(place.frames.times, device),
                height=place.frames.height,
                width=place.frames.width,
                strides=place.plan.strides,
                corners=async_tensor_h2d(place.frames.corners, device) if place.frames.corners.any() else None,
                text=async_tensor_h2d(place.frames.text(), device) if place.plan.text_tokens else None,
            )
            for place in self._places(features)
            if place.plan is not None
        )

    def _places(self, features: Sequence[Any]) -> Iterator[Place]:
        """Every picture and video, in the prompt's order."""
        token = position = 0
        ordered = sorted(features, key=lambda feature: feature.mm_position.offset)
        for feature, frames in zip(ordered, self.frames_of_items(ordered), strict=True):
            offset, length = feature.mm_position.offset, feature.mm_position.length
            position += offset - token
            yield Place(offset, length, position, frames, compressed_plan(feature))
            token, position = offset + length, position + frames.extent


class MropePositions(PrunedPositions):
    """For a stock model with `iter_mm_grid_thw`: its videos are grids and nothing else, as Qwen2-VL's are."""

    def frames_of_items(self, features: Sequence[Any]) -> Iterator[Frames]:
        """Frames stand in time as stock has it."""
        grids = self.iter_mm_grid_thw(features)  # type: ignore[attr-defined]  # the stock model's
        for _, frames, height, width, factor in grids:
            yield grid_frames(frame_times(frames, factor), height, width)


def compressed_plan(feature: Any) -> VideoPlan | None:
    """The plan of a video that METok compresses; None for every other item."""
    if feature.modality != "video":
        return None
    plan = VideoPlan.from_tensor(feature.data[PLAN_FIELD].data)
    return plan if plan.compressed else None


def _text(first: int, length: int) -> Integers:
    """Positions of text, [AXES, length]: the same on all axes."""
    return _same(np.arange(first, first + length))


def _same(positions: Integers) -> Integers:
    """Positions [n] on all axes, [AXES, n]."""
    return np.broadcast_to(positions, (AXES, len(positions)))
